"""How decoding slows down with the context: a hybrid beside a control of equal size whose mixers are all attention.

What is timed is one program of the engine, which decodes `--steps` tokens for every slot, and the copy of its tokens to
the host. Its caches are filled with arbitrary numbers instead of by reading prompts, and the host's scheduling is left
out. `python experiments/decode_throughput/run.py contexts --help` lists the options.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import models
import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.infer.engine import Engine
from orogen.infer.forward import NONE
from orogen.infer.knobs import Features
from orogen.infer.packing import pack
from orogen.infer.programs import Held, Programs
from orogen.infer.state import ON, State, no_seats, no_state
from orogen.model.count import count

PAGE, GREEDY = 64, Features()
USED = 0.85  # of the memory: the rest is for activations, logits and what the allocator loses
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Point:
    """One decoding program: all slots that run have a text of `context` tokens when it has run. running: how many of
    the slots do; None: all."""

    programs: Programs
    slots: int
    context: int
    running: int | None = None
    shrinks: bool = False  # to as many slots as fit, if the compiled program takes more than there is

    @property
    def pages(self) -> int:
        return self.slots * -(-self.context // PAGE)

    def inputs(self, held: Held, calls: int = 1) -> tuple[Any, ...]:
        """What the program takes: every slot in pages of its own, with as many tokens to come as so many calls make."""
        steps, row = self.programs.config.steps, (np.arange(self.slots) < self._running).astype(np.int32)
        table_bp = np.arange(self.pages, dtype=np.int32).reshape(self.slots, -1)
        history = held.state.history._replace(number_b=np.ones(self.slots, np.int32))
        left = calls * steps
        state = State(row, (self.context - left) * row, left * row, None, history)
        seats = no_seats(self.slots, GREEDY)._replace(runs_b=ON * row)
        return self.programs.decode_inputs(Held(held.caches, state), (pack(seats), table_bp, None), steps)

    @property
    def _running(self) -> int:
        return self.slots if self.running is None else self.running

    def lowered(self) -> Any:
        """The program, traced for these sizes."""
        caches = jax.eval_shape(lambda: self.programs.start(self.slots, self.pages))
        return self.programs.decoder(GREEDY).lower(*self.inputs(Held(caches, self.state())))

    def state(self) -> State:
        """Of the program's slots."""
        size = self.programs.opened.config.vocab_size
        return self.programs.put(no_state(self.slots, self.programs.everything, vocab_size=size, drafts=0))

    def measure(self, program: Any, *, calls: int) -> dict[str, Any]:
        """Seconds per step of `calls` calls, after one that is not counted."""
        held = Held(filled(self.programs.start(self.slots, self.pages)), self.state())
        steps = self.programs.config.steps
        seconds = []
        for _ in range(calls + 1):
            inputs = self.inputs(held)
            began = time.perf_counter()
            held, emitted = program(*inputs)
            tokens = np.asarray(emitted.report.token)
            seconds.append((time.perf_counter() - began) / steps)
            if (tokens[: self._running] == NONE).any() or np.asarray(emitted.bad_b).any():
                raise RuntimeError(f"{self.slots} slots at {self.context} tokens did not decode {steps} tokens each")
        step_s = statistics.median(seconds[1:])
        return {
            "context": self.context, "batch": self.slots, "step_ms": 1e3 * step_s,
            "tokens_per_s": self.slots / step_s, "least_ms": 1e3 * min(seconds[1:]), "most_ms": 1e3 * max(seconds[1:]),
            "cache_bytes": self.programs.bytes_per_device(self.slots, self.pages),
        }  # fmt: skip

    def alone(self, *, calls: int) -> float:
        """Seconds per step of `calls` calls that the host dispatches one after another and waits for at the end."""
        held = Held(filled(self.programs.start(self.slots, self.pages)), self.state())
        program = self.programs.decoder(GREEDY)
        warm = 2  # both may compile: caches that the program returned differ in their sharding from new ones
        held, *given = self.inputs(held, calls + warm)
        began, emitted = 0.0, None
        for call in range(calls + warm):
            if call == warm:
                jax.block_until_ready(emitted)
                began = time.perf_counter()
            held, emitted = program(held, *given)
        jax.block_until_ready(emitted)
        return (time.perf_counter() - began) / (calls * self.programs.config.steps)


@jax.jit(donate_argnums=0, keep_unused=True)  # jax drops arguments whose values nothing reads, donated or not
def filled(caches: Any) -> Any:
    """Caches of numbers from -1 to 1, written over those given: what is read takes power, zeros less of it."""

    def fill(a: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        index = sum((axis + 2.3) * jax.lax.broadcasted_iota(jnp.float32, a.shape, axis) for axis in range(a.ndim))
        return jnp.sin(index).astype(a.dtype)

    return jax.tree.map(fill, caches)


def bytes_of(tree: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def most_slots(programs: Programs, context: int, memory: int) -> int:
    """As many slots as fit beside the weights, from sizes alone; a multiple of 8 if there are as many."""
    pages = -(-context // PAGE)
    one, two = (programs.bytes_per_device(slots, slots * pages) for slots in (1, 2))
    each = two - one + 4 * 4 * programs.opened.config.vocab_size  # and logits, some copies of them
    slots = int((USED * memory - bytes_of((programs.opened.params, programs.opened.buffers))) // each)
    return slots if slots < 8 else slots // 8 * 8


def memory_of(options: argparse.Namespace) -> int:
    """Bytes of the device's memory, or as many as were named."""
    if options.memory is not None:
        return int(options.memory * GIB)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise SystemExit("this device does not say how much memory it has; expected --memory GIB")
    return limit


def points(model: Opened, options: argparse.Namespace) -> Iterator[Point]:
    """Of each context the batches that fit."""
    for context in options.contexts:
        config = EngineConfig(
            slots=1, max_length=context, page=PAGE, chunk=PAGE, prefill_tokens=PAGE, steps=options.steps, snapshots=0,
            prefix_cache=False, compute_dtype=options.dtype, kernels=options.kernels,
        )  # fmt: skip
        programs = Programs(model, config, 0, context, np.ones(model.config.vocab_size, bool))
        most = most_slots(programs, context, options.memory_bytes)
        # See run.py: one row is slower than four on a GPU.
        least = 4 if options.kernels == "triton" else 1
        wanted = [most if batch == "max" else max(int(batch), least) for batch in options.batches]
        for slots in sorted(set(wanted)):
            if 0 < slots <= most:
                yield Point(programs, slots, context, shrinks=slots == most)
            else:
                print(f"{slots} slots of {context} tokens do not fit: at most {most}", flush=True)


def fitted(point: Point, lowered: Any, *, memory: int) -> tuple[Point, Any, int] | None:
    """The point, its program and the bytes that this takes; of fewer slots if need be and the point allows it."""
    while True:
        program = lowered.compile()
        sizes = program.memory_analysis()
        given_back = sizes.output_size_in_bytes - sizes.alias_size_in_bytes  # what is not written over arguments
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + given_back
        if needed <= memory:
            return point, program, needed
        print(f"{point.slots} slots of {point.context} tokens: the program takes {needed / GIB:.1f} GiB", flush=True)
        fewer = int(0.95 * point.slots * memory / needed) // 8 * 8
        if not point.shrinks or not fewer:
            return None
        point = dataclasses.replace(point, slots=fewer)
        lowered = point.lowered()


def measure(config: ModelConfig, kind: str, options: argparse.Namespace) -> None:
    """Writes a row for each point of one model."""
    random = models.opened(config, models.PLANS[options.kernels], options.dtype)
    small = EngineConfig(
        slots=1, max_length=PAGE, page=PAGE, chunk=PAGE, prefill_tokens=PAGE, snapshots=0, prefix_cache=False,
        compute_dtype=options.dtype, kernels=options.kernels,
    )  # fmt: skip
    model = Engine(random, small).opened  # the weights as an engine lays them out
    del random
    parameters, weights = count(config)["total"], bytes_of((model.params, model.buffers))
    all_points = list(points(model, options))
    lowered = [point.lowered() for point in all_points]
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        fitting = list(pool.map(functools.partial(fitted, memory=options.memory_bytes), all_points, lowered))
    for point, program, needed in filter(None, fitting):
        record = {
            "model": options.model, "mixers": kind, "parameters": parameters, "weight_bytes": weights,
            "dtype": options.dtype, "kernels": options.kernels, "device": jax.devices()[0].device_kind,
            "jax": jax.__version__, "memory_bytes": options.memory_bytes, "program_bytes": needed,
        } | point.measure(program, calls=options.calls)  # fmt: skip
        print(json.dumps(record), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Both models side by side; of batches that differ between them, the largest of each."""
    lines = [
        "| context | batch, hybrid | tokens/s | batch, attention | tokens/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for context in sorted({row["context"] for row in rows}):
        here = {kind: {} for kind in ("hybrid", "attention")}
        for row in rows:
            if row["context"] == context:
                here[row["mixers"]][row["batch"]] = row["tokens_per_s"]
        ours, theirs = here["hybrid"], here["attention"]
        pairs = [(batch, batch) for batch in sorted(ours.keys() & theirs.keys())]
        if ours and theirs and (largest := (max(ours), max(theirs))) not in pairs:
            pairs.append(largest)
        for a, b in pairs:
            lines.append(f"| {context:,} | {a} | {ours[a]:,.0f} | {b} | {theirs[b]:,.0f} | {ours[a] / theirs[b]:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="run.py contexts", description=__doc__.splitlines()[0])
    numbers = lambda text: [int(each) for each in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="bench_dense", help="of gin_configs/models")
    parser.add_argument("--contexts", type=numbers, default=[256, 1024, 4096], help="tokens of each text at the end")
    parser.add_argument("--batches", type=lambda text: text.split(","), default=["1", "8"], help="numbers, or max")
    parser.add_argument("--memory", type=float, help="GiB that max fills; the device's unless given")
    parser.add_argument("--steps", type=int, default=32, help="of decoding in one call")
    parser.add_argument("--calls", type=int, default=3, help="that are timed")
    parser.add_argument("--kernels", choices=models.PLANS, default=None, help="triton on a GPU, unless given")
    parser.add_argument("--dtype", default=None, help="bfloat16 with triton, else float32, unless given")
    parser.add_argument("--out", type=Path, help="contexts.jsonl beside this file, or contexts_gpu.jsonl")
    options = parser.parse_args(arguments)
    options.kernels = options.kernels or ("triton" if jax.default_backend() == "gpu" else "reference")
    options.dtype = options.dtype or models.DTYPES[options.kernels]
    name = "contexts_gpu.jsonl" if jax.default_backend() == "gpu" else "contexts.jsonl"
    options.out = options.out or Path(__file__).parent / name
    options.memory_bytes = memory_of(options)
    if min(options.contexts) <= options.steps:
        raise SystemExit(f"--contexts has {min(options.contexts)}; expected more than --steps {options.steps}")
    hybrid = models.named(options.model)
    measure(hybrid, "hybrid", options)
    measure(models.all_attention(hybrid), "attention", options)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(table([row for row in rows if row["model"] == options.model]))
