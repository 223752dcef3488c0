"""Tokens per second of an engine whose requests arrive at random, beside the same work as static batches.

One process, one model with random weights, one set of requests with drawn lengths of prompts and answers; each ends at
its `max_tokens` alone. `static` submits as many as there are slots, and the next as many when all of those have ended;
`steady` is what static batching could reach at best: batches in which all prompts and all answers have the same, mean
length. `offered` is what the engine does: with all requests waiting from the start, then with Poisson arrivals, whose
rate is given as a share of the requests per second so measured. `host_share` is the time of rounds in which the host
did not wait, most of it while the devices computed; `host_cpu` is the processor's time that the engine's thread took.
A run ends with a tail in which no request comes any more: `while_arriving` has the tokens per second made, and those
that were asked for, from a fifth of the arrivals to the last one. `pieces` are the milliseconds in which one prompt of
so many tokens is read, alone, or so many at once.

    python experiments/decode_throughput/arrivals.py --model bench_dense --slots 8                     # CPU
    python experiments/decode_throughput/arrivals.py --model r1 --slots 64 --kernels triton \\
        --prompt 1024 --tokens 256 --requests 512                                                      # one NVIDIA GPU
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import models
import numpy as np

from orogen.config.engine import EngineConfig
from orogen.config.load import parse
from orogen.infer.engine import Engine
from orogen.infer.request import Request, Sampling
from orogen.infer.stats import Stats

HERE = Path(__file__).parent


def drawn(vocab_size: int, count: int, *, prompt: int, tokens: int) -> list[Request]:
    """Requests with lengths from a half to one and a half of these means, uniformly."""
    draw = np.random.default_rng(0)
    lengths = zip(
        *(draw.integers(mean - mean // 2, mean + mean // 2 + 1, count) for mean in (prompt, tokens)), strict=True
    )
    return [
        Request(
            prompt=tuple(draw.integers(0, vocab_size, length).tolist()), max_tokens=int(most),
            sampling=Sampling(temperature=0), ignore_eos=True,
        )
        for length, most in lengths
    ]  # fmt: skip


class Run:
    """Requests that an engine answers, with the times at which each arrived and its tokens came."""

    def __init__(self, engine: Engine, requests: Sequence[Request], arrivals: Sequence[float]) -> None:
        self.engine, self.waiting = engine, list(zip(arrivals, requests, strict=True))[::-1]
        self.arrived: dict[int, float] = {}
        self.told: dict[int, list[tuple[float, int]]] = {}
        self.began = time.perf_counter()

    def step(self) -> None:
        """Submits what has arrived, and steps; waits for the next arrival if there is nothing to do."""
        now = time.perf_counter() - self.began
        while self.waiting and (self.waiting[-1][0] <= now or not self.engine.busy):
            at, request = self.waiting.pop()
            time.sleep(max(0.0, at - now))
            self.arrived[self.engine.submit(request)] = at
            now = max(now, at)
        for output in self.engine.step():
            self.told.setdefault(output.number, []).append((time.perf_counter() - self.began, len(output.tokens)))

    def while_arriving(self) -> dict[str, float]:
        """Tokens per second that were made, and asked for, from the first fifth of the arrivals to the last one."""
        times = sorted(self.arrived.values())
        first, last = times[len(times) // 5], times[-1]
        if last <= first:
            return {}
        inside = lambda at: first < at <= last  # noqa: E731
        made = sum(count for each in self.told.values() for at, count in each if inside(at))
        asked = sum(count for number, at in self.arrived.items() for _, count in self.told[number] if inside(at))
        return {"made_per_s": round(made / (last - first), 1), "asked_per_s": round(asked / (last - first), 1)}

    def finish(self) -> dict[str, Any]:
        """Until all have ended: tokens per second, and percentiles of waiting for the first token and, of what streams
        tell at a time, for each further one."""
        stats = self.engine.stats
        before, cpu, rounds = dataclasses.replace(stats), time.thread_time(), 0
        while self.waiting or self.engine.busy:
            self.step()
            rounds += 1
        cpu = time.thread_time() - cpu  # what other programs take of the machine does not count
        seconds = time.perf_counter() - self.began
        first = [each[0][0] - self.arrived[number] for number, each in self.told.items()]
        gaps = [
            (later - earlier) / count
            for each in self.told.values()
            for (earlier, _), (later, count) in zip(each, each[1:], strict=False)
            for _ in range(count)
        ]
        tokens = sum(count for each in self.told.values() for _, count in each)
        ms = lambda values, q: round(1e3 * float(np.percentile(values, q)), 2)  # noqa: E731
        return {
            "tokens_per_s": round(tokens / seconds, 1), "requests_per_s": round(len(first) / seconds, 3),
            "first_p50_ms": ms(first, 50), "first_p99_ms": ms(first, 99), "next_p50_ms": ms(gaps, 50),
            "next_p99_ms": ms(gaps, 99),
            "host_share": round((stats.host_seconds - before.host_seconds) / seconds, 4),
            "host_cpu_ms_per_round": round(1e3 * cpu / rounds, 3),
            "host_cpu_us_per_token": round(1e6 * cpu / tokens, 1),
            "device_share": round((stats.device_seconds - before.device_seconds) / seconds, 4), "rounds": rounds,
            "occupied": occupied(before, self.engine), "while_arriving": self.while_arriving(),
        }  # fmt: skip


def occupied(before: Stats, engine: Engine) -> float:
    """The share of the slots that calls of decoding computed tokens for."""
    now, slots = engine.stats, engine.config.slots
    return round((now.steps - before.steps) / ((now.called_steps - before.called_steps) * slots), 3)


def static(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Batch after batch, each when the one before has ended."""
    slots, before, began = engine.config.slots, dataclasses.replace(engine.stats), time.perf_counter()
    for first in range(0, len(requests), slots):
        engine.run(requests[first : first + slots])
    seconds = time.perf_counter() - began
    tokens = sum(request.max_tokens for request in requests)
    return {"tokens_per_s": round(tokens / seconds, 1), "occupied": occupied(before, engine)}


def pieces(engine: Engine, turns: int = 5) -> dict[str, float]:
    """Milliseconds, medians, in which prompts are read that have the length of a call: one, and as many as it takes."""
    found = {}
    for length in engine.buckets.lengths:
        for count in engine.buckets.rows(length):
            if length >= engine.length or count > engine.config.slots:
                continue
            draw, times = np.random.default_rng(2), []
            for _ in range(turns):
                ids = draw.integers(0, engine.opened.config.vocab_size, (count, length)).tolist()
                asked = [Request(prompt=tuple(each), max_tokens=1, ignore_eos=True) for each in ids]
                began = time.perf_counter()
                engine.run(asked)
                times.append(1e3 * (time.perf_counter() - began))
            found[f"{count} x {length}"] = round(float(np.median(times)), 2)
    return found


def measured(engine: Engine, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per way to serve the requests."""
    size, lengths = engine.opened.config.vocab_size, {"prompt": options.prompt, "tokens": options.tokens}
    requests = drawn(size, options.requests, **lengths)
    even = [
        dataclasses.replace(request, prompt=(request.prompt * 3)[: options.prompt], max_tokens=options.tokens)
        for request in requests
    ]
    steady = static(engine, even)
    share = lambda record: {**record, "of_steady": round(record["tokens_per_s"] / steady["tokens_per_s"], 3)}  # noqa: E731
    yield {"work": "steady", **steady, "pieces": pieces(engine)}
    yield share({"work": "static", **static(engine, requests)})
    most = Run(engine, requests, [0.0] * len(requests)).finish()
    yield share({"work": "offered", "load": "all", **most})
    for load in map(float, options.loads.split(",")):
        gaps = np.random.default_rng(1).exponential(1 / (load * most["requests_per_s"]), len(requests))
        yield share({"work": "offered", "load": load, **Run(engine, requests, np.cumsum(gaps).tolist()).finish()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench_dense", help="of gin_configs/models")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="mean tokens")
    parser.add_argument("--tokens", type=int, default=48, help="mean tokens of an answer")
    parser.add_argument("--steps", type=int, default=8, help="most steps of decoding in one call")
    parser.add_argument("--prefill_tokens", type=int, default=512)
    parser.add_argument("--loads", default="0.5,0.8,0.95")
    parser.add_argument("--kernels", choices=("reference", "triton"), default="reference")
    parser.add_argument("--out", type=Path, default=HERE / "arrivals.jsonl")
    options = parser.parse_args()
    model = parse([f"gin_configs/models/{options.model}.gin"], [])[0].model
    assert model is not None
    dtype = "bfloat16" if options.kernels == "triton" else "float32"
    plan = models.PLANS[options.kernels]
    longest = 3 * (options.prompt + options.tokens) // 2 + 2
    config = EngineConfig(
        slots=options.slots, max_length=longest, page=32, chunk=128, prefill_tokens=options.prefill_tokens,
        steps=options.steps, snapshots=0, prefix_cache=False, queue=options.requests, compute_dtype=dtype,
        kernels=options.kernels,
    )  # fmt: skip
    engine, began = Engine(models.opened(model, plan, dtype), config), time.perf_counter()
    facts = {
        "model": options.model, "slots": options.slots, "prompt": options.prompt, "tokens": options.tokens,
        "requests": options.requests, "steps": options.steps, "prefill_tokens": options.prefill_tokens,
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "programs": engine.warm(),
        "warm_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    before = dict(engine.programs.traces)
    engine.run(drawn(model.vocab_size, options.slots, prompt=options.prompt, tokens=options.tokens))
    with options.out.open("a") as file:
        for record in measured(engine, options):
            print(line := json.dumps(facts | record), flush=True)
            file.write(line + "\n")
            file.flush()
    if dict(engine.programs.traces) != before:
        raise RuntimeError(f"programs {dict(engine.programs.traces)}; expected none beyond {before}")


if __name__ == "__main__":
    main()
