"""Tokens per second of decoding by the engine, beside transformers' cached greedy decoding where it is installed.

One process, one model with random weights. Every request has a prompt of random tokens and ends at `max_tokens` alone;
what is timed are whole calls of the engine in which every request decodes, or transformers' steps after its prefill.

    python experiments/decode_throughput/run.py --model bench_dense --batches 1,8 --peer       # CPU
    python experiments/decode_throughput/run.py --model r1 --batches 1,64 --kernels triton     # one NVIDIA GPU
    python experiments/decode_throughput/run.py contexts --help                                # see contexts.py
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import contexts
import jax
import models
import numpy as np

from orogen.bench.weights import export_weights
from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.infer.engine import Engine
from orogen.infer.request import Request, Sampling
from orogen.layers import thin

HERE = Path(__file__).parent
CALLS, TURNS = 6, 3  # of the decoding program by itself


class Sizes(NamedTuple):
    """Of a run: requests, tokens of their prompts and answers, and of a call."""

    batch: int
    length: int
    tokens: int
    steps: int


def prompts(model: ModelConfig, batch: int, length: int) -> list[tuple[int, ...]]:
    draw = np.random.default_rng(0)
    return [tuple(draw.integers(0, model.vocab_size, length).tolist()) for _ in range(batch)]


def decode(engine: Engine, batch: int, length: int, tokens: int, told: dict[str, Any]) -> Iterator[float]:
    """Seconds per token of each call in which all requests decode. Tells the requests' tokens, and the time to the
    first one."""
    for prompt in prompts(engine.opened.config, batch, length):
        engine.submit(Request(prompt=prompt, max_tokens=tokens, sampling=Sampling(temperature=0), ignore_eos=True))
    began, found = time.perf_counter(), {}
    while engine.busy:
        before, started = engine.stats.generated_tokens, time.perf_counter()
        outputs = engine.step()
        passed, made = time.perf_counter() - started, engine.stats.generated_tokens - before
        for output in outputs:
            found.setdefault(output.number, []).extend(token.id for token in output.tokens)
        if "first_s" not in told and outputs:
            told["first_s"] = time.perf_counter() - began
        if made == engine.config.steps * batch:
            yield passed / engine.config.steps
    told["ids"] = [ids for _, ids in sorted(found.items())]


def peer_decode(folder: Path, config: ModelConfig, sizes: Sizes, told: dict[str, Any]) -> Iterator[float]:
    """The same by transformers, in the dtype of the folder, of as many tokens at a time as the engine's calls make."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    net = net.to("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.tensor(prompts(config, sizes.batch, sizes.length), device=net.device)
    found = []
    with torch.inference_mode():
        out = net(input_ids=ids, use_cache=True)
    for first in range(0, sizes.tokens - sizes.steps + 1, sizes.steps):
        started = time.perf_counter()
        with torch.inference_mode():
            for step in range(first, first + sizes.steps):
                chosen = out.logits[:, -1].argmax(-1, keepdim=True)
                found.append(chosen[:, 0].tolist())
                out = net(
                    input_ids=chosen, past_key_values=out.past_key_values, use_cache=True,
                    cache_position=torch.tensor([sizes.length + step], device=net.device),
                )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        told["ids"] = [list(row) for row in zip(*found, strict=True)]
        yield (time.perf_counter() - started) / sizes.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench_dense", help="of gin_configs/models")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--tokens", type=int, default=257, help="of each answer")
    parser.add_argument("--steps", type=int, default=32, help="of decoding in one call")
    parser.add_argument("--kernels", choices=models.PLANS, default="reference")
    parser.add_argument("--dtype", default=None, help="bfloat16 with triton, else float32, unless given")
    parser.add_argument("--replay", type=int, default=0)
    parser.add_argument(
        "--weights", default=models.DRAWN, help=f"some of {', '.join(models.WEIGHTS)}, one after another"
    )
    parser.add_argument("--together", default=str(thin.ROWS), help="rows that one kernel multiplies by all of a layer")
    parser.add_argument("--alone", action="store_true", help="only the decoding program, without prompts and an engine")
    parser.add_argument("--peer", action="store_true", help="transformers, in turn")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    options.dtype = options.dtype or models.DTYPES[options.kernels]
    config, first = models.named(options.model), {}
    for weights in options.weights.split(","):
        opened = models.opened(config, models.PLANS[options.kernels], options.dtype, weights)
        for together, batch in itertools.product(numbers(options.together), numbers(options.batches)):
            thin.ROWS = together
            record, ids = (alone if options.alone else measured)(opened, batch, options)
            record |= {"weights": weights, "together": together}
            same = [a[:16] == b[:16] for a, b in zip(ids, first.setdefault(batch, ids), strict=True)]
            record["same_16"] = sum(same)  # as with the first kind of weights
            print(json.dumps(record), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        del opened


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def config_of(batch: int, options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        # One row is slower than four on a GPU: XLA makes sums of its products, at a third of the bandwidth.
        slots=max(batch, 4) if options.kernels == "triton" else batch,
        max_length=options.prompt + options.tokens, page=64, chunk=256, prefill_tokens=max(options.prompt, 4096),
        steps=options.steps, snapshots=0, prefix_cache=False, compute_dtype=options.dtype, kernels=options.kernels,
        replay=options.replay,
    )  # fmt: skip


def facts(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Of every record."""
    return {
        "model": options.model, "batch": batch, "prompt": options.prompt, "dtype": options.dtype,
        "kernels": options.kernels, "replay": options.replay, "device": jax.devices()[0].device_kind,
        "jax": jax.__version__, "flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def alone(opened: Opened, batch: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]]]:
    """One record of the decoding program, whose caches hold arbitrary numbers, and no tokens."""
    config = config_of(batch, options)
    engine = Engine(opened, config)
    point = contexts.Point(engine.programs, config.slots, config.max_length, running=batch)
    seconds = [point.alone(calls=CALLS) for _ in range(TURNS)]
    step_s = statistics.median(seconds)
    return facts(batch, options) | {
        "alone_ms": 1e3 * step_s, "turns_ms": [1e3 * each for each in seconds], "tokens_per_s": batch / step_s,
        "weight_bytes": contexts.bytes_of((engine.opened.params, engine.opened.buffers)),
    }, []  # fmt: skip


def measured(opened: Opened, batch: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]]]:
    """One record, and the requests' tokens."""
    config, told = config_of(batch, options), {}
    engine = Engine(opened, config)
    turns = lambda tokens: decode(engine, batch, options.prompt, tokens, told)  # noqa: E731
    list(turns(options.steps + 1))  # compiles
    told.clear()
    record = facts(batch, options)
    if options.peer:
        seconds, beside = beside_peer(opened, turns(options.tokens), batch, told, options)
        record |= beside
    else:
        seconds = list(turns(options.tokens))
    if not seconds:
        raise SystemExit(
            f"--tokens {options.tokens}: no call in which all {batch} requests decode; expected more, since the "
            "first ones end before the last ones have read their prompts"
        )
    step_s = statistics.median(seconds)
    alone_s = contexts.Point(engine.programs, config.slots, config.max_length, running=batch).alone(calls=CALLS)
    return record | {
        "step_ms": 1e3 * step_s,
        # The same program without an engine around it; the rest of a step is time in which the device waits.
        "alone_ms": 1e3 * alone_s,
        "between_steps": max(0.0, 1 - alone_s / step_s),
        "tokens_per_s": batch / step_s,
        "first_token_ms": 1e3 * told["first_s"],
    }, told["ids"]


def beside_peer(
    opened: Opened, turns: Iterator[float], batch: int, told: dict[str, Any], options: argparse.Namespace
) -> tuple[list[float], dict[str, Any]]:
    """Seconds per token of our calls, each in turn with one of transformers', so that both meet the same neighbours."""
    sizes, theirs = Sizes(batch, options.prompt, options.tokens, options.steps), {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        export_weights(opened.config, opened.params, opened.buffers, weights)
        pairs = list(zip(turns, peer_decode(weights, opened.config, sizes, theirs), strict=False))
    if len(pairs) < 2:
        raise SystemExit(f"--tokens {options.tokens}: {len(pairs)} pairs of calls; expected at least 2")
    seconds, peer_seconds = ([pair[side] for pair in pairs] for side in (0, 1))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    same = [a[:16] == b[:16] for a, b in zip(told["ids"], theirs["ids"], strict=True)]
    return seconds, {
        "peer_tokens_per_s": batch / statistics.median(peer_seconds), "peer_same_16": sum(same),
        "pairs": len(pairs), "ratio": middle, "ratio_quartiles": [low, high],
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["contexts"]:
        contexts.main(sys.argv[2:])
    else:
        main()
