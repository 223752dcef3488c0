"""What an engine holds after many requests that end in every way: nothing."""

import random

import jax
import jax.numpy as jnp
import pytest

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.infer.engine import Engine
from orogen.infer.request import CANCELLED, ERROR, LENGTH, STOP, Full, Grammar, Request, Sampling
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import single_device_plan

MODEL = ModelConfig(
    pattern="M*", vocab_size=40, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    mamba_num_heads=2, mamba_head_dim=4, n_groups=1, ssm_state_size=6, conv_kernel=3, chunk_size=8,
)  # fmt: skip
POISON = 7  # a token whose embedding is NaN: who reads it fails
CONFIG = EngineConfig(
    slots=3, max_length=32, page=16, chunk=16, prefill_tokens=16, steps=4, snapshots=3, pages=5, queue=6,
    written_out=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    params, buffers = jax.jit(lambda: initial_state(MODEL, 0))()
    weight = params["embedding"]["weight"]
    weight[...] = weight[...].at[POISON].set(jnp.nan)
    return Engine(Opened(MODEL, single_device_plan(PlanConfig(), MODEL), build(MODEL), params, buffers, None), CONFIG)


def request(prompt, tokens: int, seed: int, **fields) -> Request:
    return Request(prompt=tuple(prompt), max_tokens=tokens, sampling=Sampling(seed=seed), **fields)


def held(engine: Engine) -> tuple[int, int, int, int]:
    """Slots and requests that are occupied, pages and snapshots that neither are free nor could be."""
    (rank,) = engine.scheduler.ranks
    return (
        len(engine._slots) + len(engine.scheduler.running),
        len(engine._waiting) + engine.scheduler.queued,
        rank.pages.count - rank.pages.free - rank.prefix.evictable_pages,
        rank.snapshots.count - rank.snapshots.free - rank.prefix.evictable_snapshots,
    )


def drain(engine: Engine, ended: dict[int, list]) -> None:
    while engine.busy:
        for output in engine.step():
            ended[output.number].append(output)


def test_two_hundred_requests_that_end_in_every_way_leave_nothing(engine):
    draw = random.Random(3)
    prefixes = [[draw.randrange(8, 40) for _ in range(20)] for _ in range(3)]
    asked, ended, full = {}, {}, 0
    while len(asked) < 200:
        prompt = prefixes[draw.randrange(3)][: draw.randrange(9, 21)] + [draw.randrange(8, 40)]
        if draw.random() < 0.15:
            prompt[draw.randrange(len(prompt))] = POISON
        one = request(prompt, draw.randrange(1, 11), draw.randrange(99), stop_ids=(draw.randrange(40),))
        try:
            number = engine.submit(one, salt=draw.choice(("", "a")))
            asked[number], ended[number] = one, []
        except Full:
            full += 1
        if draw.random() < 0.3:
            engine.cancel(draw.choice(list(asked)))
        for output in engine.step() if draw.random() < 0.5 else ():
            ended[output.number].append(output)
    drain(engine, ended)
    assert held(engine) == (0, 0, 0, 0)
    assert full and engine.stats.cached_tokens
    finishes = [[o.finish for o in each if o.finish] for each in ended.values()]
    assert all(len(each) == 1 for each in finishes), "every request ends once"
    assert {each[0] for each in finishes} == {CANCELLED, ERROR, LENGTH, STOP}
    for number, one in asked.items():
        tokens = [c.id for o in ended[number] for c in o.tokens]
        read = [*one.prompt, *tokens[:-1]]
        last = ended[number][-1]
        assert len(tokens) <= one.max_tokens
        if last.finish == ERROR:
            assert POISON in [*one.prompt, *tokens] and "not numbers" in last.error
        elif last.finish != CANCELLED:
            assert POISON not in read, "who reads the poison fails"
    # Alone, after all that the engine has been through, each answers as it did.
    for number in draw.sample([n for n in asked if ended[n][-1].finish in (LENGTH, STOP)], 5):
        (again,) = engine.run([asked[number]])
        assert [c.id for o in again for c in o.tokens] == [c.id for o in ended[number] for c in o.tokens]
    (rank,) = engine.scheduler.ranks
    rank.prefix.clear()
    assert (rank.pages.free, rank.snapshots.free) == (rank.pages.count, rank.snapshots.count)


def test_what_is_refused_leaves_nothing(engine):
    before = held(engine)
    for one in (
        request([8] * 24, 9, 0),
        request([40], 1, 0),
        request([8], 1, 0, stop=("a",)),
        request([8], 1, 0, grammar=Grammar(kind="regex", text="a")),
    ):
        with pytest.raises(ConfigError):
            engine.submit(one)
    assert held(engine) == before and not engine.busy


def test_a_request_is_cancelled_while_its_prompt_is_read(engine):
    number = engine.submit(request(range(8, 35), 5, 0))
    assert engine.step() == []
    assert held(engine)[0] == 2
    engine.cancel(number)
    engine.cancel(number)
    (output,) = engine.step()
    assert (output.number, output.finish, output.tokens) == (number, CANCELLED, ())
    assert held(engine) == (0, 0, 0, 0) and not engine.busy


def test_salts_share_no_prefix(engine):
    prompt = list(range(8, 28))
    cached = []
    for salt in ("x", "x", "y"):
        before = engine.stats.cached_tokens
        engine.submit(request(prompt, 1, 0), salt=salt)
        drain(engine, {n: [] for n in range(10**4)})
        cached.append(engine.stats.cached_tokens - before)
    assert cached == [0, 16, 0]
