"""What a round of the engine dispatches, when it tells what came of it, and what it sends to the devices."""

import threading

import pytest
from tests.infer.engines import answers, asked, check_greedy, engine_of, ids, opened, random_prompt

from orogen.data.vocabulary import byte_tokenizer
from orogen.infer import engine as engines
from orogen.infer.request import Grammar, Sampling


@pytest.fixture(scope="module")
def model():
    tokenizer = byte_tokenizer()
    return opened("*", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)


def noted(engine, *names: str) -> list[str]:
    """Calls with these names that are queued for the devices, and `tell`, in their order."""
    events = []

    def note(owner, attribute: str, name: str) -> None:
        run = getattr(owner, attribute)
        setattr(owner, attribute, lambda *a, **k: events.append(name) or run(*a, **k))

    for name in names:
        note(engine._lane, name, name)
    note(engine, "_tell", "tell")
    return events


def test_a_call_is_dispatched_before_the_last_one_is_told(model):
    """The devices never wait for the host; a request that has read its prompt decodes in the same round."""
    engine = engine_of(model)
    events = noted(engine, "read", "decode")
    request = asked(random_prompt(1, 5), 10, ignore_eos=True)
    number = engine.submit(request)
    rounds = []
    while engine.busy:
        rounds.append(engine.step())
    assert events == ["read", "decode", "tell", *["decode", "tell"] * 2, "tell"]
    assert [len(ids(outputs)) for outputs in rounds] == [1, 3, 3, 3]
    check_greedy(model, [request], [[o for outputs in rounds for o in outputs if o.number == number]], 32)


def test_a_grammar_sees_a_token_before_the_next_is_chosen(model):
    pytest.importorskip("llguidance")
    engine = engine_of(model)
    events = noted(engine, "read", "decode")
    engine.run([asked(random_prompt(1, 5), 4, grammar=Grammar(kind="regex", text="[ab]{9}"))])
    assert events == ["read", "tell", *["decode", "tell"] * 3]


def test_calls_are_short_while_requests_wait(model, monkeypatch):
    """A slot is free only when its end is told."""
    monkeypatch.setattr(engines, "SHORT", 2)
    engine, steps = engine_of(model, slots=1), []
    run = engine._lane.decode
    engine._lane.decode = lambda *a, **k: steps.append(k["steps"]) or run(*a, **k)
    engine.run([asked((5, 6), 7), asked((7,), 7)])
    assert steps == [2, 2, 2, 3, 3]


def test_calls_are_short_while_prompts_are_read(model, monkeypatch):
    """In three rounds, up to 8, 24 and 29 tokens, beside a slot that decodes."""
    monkeypatch.setattr(engines, "SHORT", 2)
    engine, steps = engine_of(model), []
    run = engine._lane.decode
    engine._lane.decode = lambda *a, **k: steps.append(k["steps"]) or run(*a, **k)
    engine.run([asked((5, 6), 12, ignore_eos=True), asked(random_prompt(0, 29), 2, ignore_eos=True)])
    assert steps == [2, 2, 3, 3, 3]


def test_the_host_goes_on_while_a_call_is_dispatched(model):
    """A GPU's dispatch of a loop takes as long as the loop. The call before is told meanwhile."""
    engine = engine_of(model)
    told, waited = threading.Event(), []
    decode, tell = engine.programs.decode, engine._tell
    engine._tell = lambda call: (tell(call), told.set())
    object.__setattr__(
        engine.programs, "decode", lambda *a, **k: waited.append(told.wait(timeout=20)) or decode(*a, **k)
    )
    engine.submit(asked((5, 6), 3, ignore_eos=True))
    assert [len(ids([output])) for output in engine.step()] == [1]
    assert engine.busy
    while engine.busy:
        engine.step()
    assert waited == [True]


def test_what_has_not_changed_is_not_sent_again(model):
    """Settings of slots and page tables: once more where a request joins, and settings where one leaves."""
    engine, sent = engine_of(model, slots=3, steps=2, prefix_cache=False), []
    put = engine.programs.put
    object.__setattr__(engine.programs, "put", lambda tree: sent.append(tree) or put(tree))
    engine._arrays._put = engine.programs.put
    sampling = Sampling(temperature=0.5, seed=3)
    engine.submit(asked((5, 6), 20, sampling, ignore_eos=True))
    counts = []
    for turn in range(8):
        if turn == 3:
            engine.submit(asked((8, 9), 3, sampling, ignore_eos=True))
        before = len(sent)
        engine.step()
        counts.append(len(sent) - before)
    assert counts[1] == counts[2] == 0, "nothing has changed"
    assert counts[3] == 2, "one array of settings, one table"
    assert counts[4:] == [1, 1, 0, 0], "settings, when the second decodes no more and when it has left"


def test_a_slot_whose_request_was_cancelled_is_the_next_one_s_alone(model):
    """Though a call that decodes for the first is under way."""
    engine = engine_of(model, slots=1)
    requests = [asked(random_prompt(n, 4 + n), 12, ignore_eos=True) for n in range(2)]
    expected = [answers(engine_of(model, slots=1), request)[0] for request in requests]
    first = engine.submit(requests[0])
    engine.step()
    engine.step()
    second = engine.submit(requests[1])
    engine.cancel(first)
    outputs = []
    while engine.busy:
        outputs += engine.step()
    assert ids(o for o in outputs if o.number == second) == expected[1]
