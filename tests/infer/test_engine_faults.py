"""What fails for one request ends it alone; what fails on the devices ends the engine, and leaves nothing."""

import jax
import pytest
from tests.infer.engines import asked, check_greedy, engine_of, ids, leaked, opened, random_prompt

from orogen.infer.request import CANCELLED, ERROR, EngineFailed


@pytest.fixture(scope="module")
def model():
    return opened("*")


class Text:
    """A text that cannot go on after some tokens, or cannot end."""

    stopped = False

    def __init__(self, pushes: int):
        self.left = pushes

    def push(self, _, *, searched: bool = True) -> str:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no such character\nsecond line")
        return "a"

    def finish(self) -> str:
        raise KeyError("end")


def test_a_text_that_fails_ends_its_request_alone(model):
    engine = engine_of(model, slots=3)
    requests = [asked(random_prompt(n, 5 + n), 9) for n in range(3)]
    numbers = [engine.submit(request) for request in requests]
    outputs = engine.step()
    for slot, pushes in ((0, 1), (2, 99)):
        engine._slots[slot].text = Text(pushes)
    outputs += engine.step()
    engine.cancel(numbers[2])
    while engine.busy:
        outputs += engine.step()
    mine = {number: [output for output in outputs if output.number == number] for number in numbers}
    check_greedy(model, requests[1:2], [mine[numbers[1]]], 32)
    assert mine[numbers[0]][-1].error == "the request failed: ValueError: no such character"
    assert mine[numbers[2]][-1].error == "the request failed: KeyError: 'end'"
    assert [mine[n][-1].finish for n in (numbers[0], numbers[2])] == [ERROR] * 2
    assert [output.finish for output in outputs].count(CANCELLED) == 0
    assert 0 < len(ids(mine[numbers[0]])) < 9
    assert leaked(engine) == [0, 0]
    check_greedy(model, requests, engine.run(requests), 32)


def test_an_engine_that_fails_while_several_requests_are_admitted_says_why(model):
    engine = engine_of(model, slots=3)
    for n in range(3):
        engine.submit(asked(random_prompt(n, 9), 4))

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")

    object.__setattr__(engine.programs, "copy", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no memory"):
        engine.step()
    assert not engine.busy and leaked(engine) == [0, 0] and not engine._slots and not engine._waiting


@pytest.mark.parametrize("where", ["read", "decode", "copy"])
def test_a_program_that_fails_ends_the_engine(model, where, monkeypatch):
    """In its second round, with requests that wait, read and decode."""
    engine = engine_of(model)
    requests = [asked(random_prompt(n, 20), 5) for n in range(4)]
    engine.run(requests[:1])
    (rank,) = engine.scheduler.ranks
    assert rank.prefix.evictable_pages
    for request in requests:
        engine.submit(request)
    engine.step()

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nlines of more")

    object.__setattr__(engine.programs, where, fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        for _ in range(9):
            engine.step()
    assert not engine.busy and leaked(engine) == [0, 0]
    assert rank.pages.free == rank.pages.count and not engine._slots and not engine._waiting
    for again in (engine.step, lambda: engine.submit(requests[0])):
        with pytest.raises(
            EngineFailed, match="the engine has failed: JaxRuntimeError: RESOURCE_EXHAUSTED: no memory$"
        ):
            again()
    engine.cancel(0)
    engine.close()
