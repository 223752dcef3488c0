"""An engine has few programs, and once it is warm it compiles nothing, whatever it is asked."""

import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tests.infer.engines import asked, engine_of, leaked, opened

from orogen.config.engine import EngineConfig
from orogen.data.vocabulary import byte_tokenizer
from orogen.infer.buckets import Buckets
from orogen.infer.request import CANCELLED, Budget, Grammar, Sampling
from orogen.infer.schedule import Piece
from orogen.infer.sizes import Sizes
from orogen.infer.warm import WORKERS, run_all, warm_aloud


def buckets(*, tensor: int = 1, ranks: int = 1, by_kernel: bool = False, **config) -> Buckets:
    """Of a model with attention."""
    config = EngineConfig(**config)
    reach = -(-config.max_length // config.page)
    slots = config.slots // ranks
    sizes = Sizes(
        ranks=ranks, slots=slots, length=config.max_length, drafts=0, reach=reach, pages=slots * reach, recurrent=True,
        snapshots=1,
    )  # fmt: skip
    return Buckets(config, sizes, tensor=tensor, tables_cost_nothing=by_kernel)


def test_the_default_engine_has_few_programs():
    """Seventeen that read and, of each of three kinds, three that decode."""
    one = buckets()
    assert one.lengths == (32, 128, 512, 2048) and one.reaches == one.decode_reaches == (4, 16, 64)
    assert [one.rows(length) for length in one.lengths] == [(1, 4), (1, 4), (1, 4), (1,)]
    assert len(list(one.reads())) == 17
    assert buckets(by_kernel=True).decode_reaches == (64,)
    on_gpu = buckets(kernels="triton")
    assert on_gpu.lengths == (128, 512, 1024, 2048) and len(list(on_gpu.reads())) == 15
    exact = buckets(exact=True)
    assert list(exact.reads()) == [(8, 2048, 64)] and exact.decode_reaches == (64,)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"slots": 6, "max_length": 100, "page": 3, "chunk": 9, "prefill_tokens": 45, "ranks": 2},
        {"slots": 24, "prefill_tokens": 700, "page": 4, "chunk": 8, "ranks": 2, "tensor": 3},
        {"slots": 5, "max_length": 70},
        {"kernels": "triton", "slots": 64, "max_length": 1922, "page": 32, "chunk": 128},
        {"kernels": "triton", "max_length": 600},
    ],
)
def test_calls_read_each_piece_once_and_in_order(config):
    """In shapes that are known before, of which more is used than the next shorter one has."""
    one, draw = buckets(**config), np.random.default_rng(0)
    known, slots = set(one.reads()), config.get("slots", 8)
    settings = EngineConfig(**{k: v for k, v in config.items() if k not in ("ranks", "tensor")})
    length, most = settings.max_length, settings.prefill_tokens
    for _ in range(200):
        pieces = []
        for slot in draw.permutation(slots)[: draw.integers(1, slots + 1)].tolist():
            count = int(draw.integers(1, min(most, length) + 1) ** draw.uniform(0.3, 1))
            start = int(draw.integers(0, length - count + 1))
            pieces.append(Piece(slot, start, count, last=bool(draw.integers(2)), row=slot))
        parts = {piece.slot: [] for piece in pieces}
        for call in one.calls(pieces):
            reach = one.reach(max(p.start + p.count for p in call.pieces), one.reaches)
            assert (call.rows, call.length, reach) in known
            ranks = np.bincount([p.slot // (slots // config.get("ranks", 1)) for p in call.pieces])
            assert call.rows < 2 * max(ranks) * config.get("tensor", 1) and max(ranks) <= call.rows
            for part in call.pieces:
                shorter = max((n for n in one.lengths if n < call.length), default=0)
                assert part.count > shorter
                parts[part.slot].append(part)
        for piece in pieces:
            found = parts[piece.slot]
            assert [p.start for p in found[1:]] == [p.start + p.count for p in found[:-1]]
            assert (found[0].start, sum(p.count for p in found)) == (piece.start, piece.count)
            assert [(p.last, p.row) for p in found[:-1]] == [(False, None)] * (len(found) - 1)
            assert (found[-1].last, found[-1].row) == (piece.last, piece.row)


def test_a_piece_is_split_where_that_is_cheaper():
    """By tokens, and what a call takes besides: as much as 32 tokens on a CPU, 256 on a GPU."""
    lengths = lambda one, count: [call.length for call in one.calls([Piece(0, 0, count, True, None)])]  # noqa: E731
    cpu, gpu = buckets(), buckets(kernels="triton")
    assert lengths(cpu, 40) == [32, 32] and lengths(gpu, 40) == [128]
    assert lengths(cpu, 300) == [128, 128, 32, 32] and lengths(gpu, 300) == [512]
    assert lengths(gpu, 1024) == [1024] and lengths(gpu, 1100) == [1024, 128] and lengths(gpu, 1900) == [2048]
    for one in (cpu, gpu):
        costs = [sum(n + one._call_tokens for n in lengths(one, count)) for count in range(1, 2049)]
        assert costs == sorted(costs)


def mixed(draw, tokenizer, *, grammars: bool):
    """A request for anything."""
    one = lambda *choices: choices[draw.integers(len(choices))]  # noqa: E731
    sampling = Sampling(
        temperature=one(0.0, 0.7), top_k=one(0, 3), top_p=one(1.0, 0.9), min_p=one(0.0, 0.1),
        presence_penalty=one(0.0, 1.0), repetition_penalty=one(1.0, 1.2), logit_bias=one((), ((70, 2.0),)),
        seed=int(draw.integers(99)),
    )  # fmt: skip
    text = "x" * int(draw.integers(1, 20)) + one("", "<think>")
    grammar = one(
        None, Grammar(kind="regex", text="[ab]{3}"), Grammar(kind="json_schema", text=json.dumps({"type": "integer"}))
    )
    return asked(
        tokenizer.encode_inside(text).tolist(), int(draw.integers(1, 7)), sampling, logprobs=one(None, 0, 2),
        budget=one(None, Budget(tokens=2)), grammar=grammar if grammars else None, ignore_eos=one(True, False),
        stop=one((), ("ab",)), stop_ids=one((), (5,), tuple(range(6, 40))),
        min_tokens=one(0, 1), held=one((), (5, 97)), prompt_logprobs=(None, None, 0, 3)[len(text) % 4],
    )  # fmt: skip


def test_a_warm_engine_compiles_nothing():
    """Requests of every kind that come, run together, and are cancelled at random."""
    grammars = pytest.importorskip("llguidance") is not None
    tokenizer, compiled = byte_tokenizer(), []
    model = opened("*", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
    engine = engine_of(model, own=True, drafter="lookup", drafts=1, slots=3)
    count = engine.warm()
    assert sum(engine.programs.traces.values()) + 3 == count == 1 + 1 + 3 + 3

    def listen(event: str, duration: float, **_) -> None:
        compiled.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    traces, draw = dict(engine.programs.traces), np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        numbers, ended = [], []
        while len(numbers) < 60 or engine.busy:
            if len(numbers) < 60 and draw.random() < 0.5:
                numbers.append(engine.submit(mixed(draw, tokenizer, grammars=grammars)))
            if numbers and draw.random() < 0.05:
                engine.cancel(int(draw.choice(numbers)))
            ended += [output for output in engine.step() if output.finish is not None]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == [] and dict(engine.programs.traces) == traces
    assert sorted(output.number for output in ended) == numbers
    assert any(output.finish == CANCELLED for output in ended) and engine.stats.cached_tokens
    assert leaked(engine) == [0, 0]


def test_an_interruption_waits_for_no_program():
    """Of those that compile, and of those that have not begun."""
    go, begun = threading.Event(), []

    def interrupted() -> None:
        raise KeyboardInterrupt

    def compiles() -> None:
        begun.append(1)
        go.wait(20)

    try:
        with pytest.raises(KeyboardInterrupt):
            run_all([interrupted, *[compiles] * 40])
        assert not go.is_set() and len(begun) <= WORKERS + 1
    finally:
        go.set()


@pytest.mark.parametrize(
    ("asked", "backend", "warms"), [(None, "cpu", 0), (None, "gpu", 1), (True, "cpu", 1), (False, "gpu", 0)]
)
def test_a_server_on_a_cpu_compiles_what_it_needs_alone(asked, backend, warms, monkeypatch, capsys):
    compiled = []
    engine = SimpleNamespace(config=EngineConfig(warm=asked), warm=lambda: compiled.append(1) or 28)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    warm_aloud(engine)
    assert len(compiled) == warms
    assert ("orogen: compiled 28 programs" in capsys.readouterr().err) == bool(warms)
