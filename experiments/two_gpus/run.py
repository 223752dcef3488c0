"""Whole training steps on two GPUs of one host, beside one GPU: `python experiments/two_gpus/run.py`.

Each plan is compiled by a process of its own, all at once; then they are timed one after another, alone on the GPUs.
The model has R1's widths and the pattern MEMEM*E. Results go to `results.jsonl` beside this file.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from orogen.bench.turns import Turn, in_turn

HERE = Path(__file__).parent
PATTERN = "MEMEM*E"
LINK_BYTES = 402_653_184  # of each rank's operand: 98,304 rows of 2048 numbers of 16 bits


class Case(NamedTuple):
    """A plan and its batch. rows: sequences per microbatch of all GPUs; microbatches; length: tokens per sequence;
    plan: bindings of PlanConfig; against: the case on one GPU with which it is compared, None for such a case itself.
    pattern: the layers, perhaps split into segments.
    """

    rows: int
    microbatches: int = 4
    length: int = 8192
    plan: dict[str, Any] = {}
    against: str | None = "one GPU"
    pattern: str = PATTERN

    def bindings(self) -> tuple[str, ...]:
        """Gin bindings of the benchmark."""
        plan = {"unroll": 2, "microbatches": self.microbatches, **self.plan}
        return (
            f"ModelConfig.pattern={self.pattern!r}",
            *(f"PlanConfig.{name}={value!r}" for name, value in plan.items()),
        )


ZERO_1 = {"data": 2, "fsdp": "optimizer"}
ZERO_3 = {"data": 2, "fsdp": "parameters"}
LONG = 65_536
STAGES = {"stage": 2, "schedule": "interleaved"}
# Segments 0 and 1 work at the same ticks, and so do 2 and 3: each pair has to take equally long.
SEGMENTS = "ME|ME|M*|E"
CASES = {
    "one GPU": Case(2, against=None),
    "one GPU, 2 microbatches": Case(4, 2, against=None),
    "data 2, ZeRO-1": Case(4, plan=ZERO_1),
    "data 2, ZeRO-3": Case(4, plan=ZERO_3),
    "data 2, ZeRO-3, 2 microbatches": Case(8, 2, plan=ZERO_3, against="one GPU, 2 microbatches"),
    "expert 2, allgather": Case(4, plan={**ZERO_1, "expert": 2}),
    "expert 2, alltoall, capacity 1.25": Case(
        4, plan={**ZERO_1, "expert": 2, "dispatch": "alltoall", "capacity_factor": 1.25}
    ),
    "expert 2, ragged, buffer 1.5": Case(
        4, plan={**ZERO_1, "expert": 2, "dispatch": "ragged", "buffer_factor": 1.5}
    ),
    "tensor 2": Case(4, plan={"tensor": 2}),
    "tensor 2, expert 2, allgather": Case(4, plan={"tensor": 2, "expert": 2}),
    "stage 2, 1F1B, 8 microbatches": Case(2, 8, plan={"stage": 2}),
    "stage 2, eager 1F1B, 8 microbatches": Case(2, 8, plan={"stage": 2, "schedule": "eager_1f1b"}),
    "stage 2, interleaved, 8 microbatches": Case(2, 8, plan=STAGES, pattern=SEGMENTS),
    "stage 2, interleaved, 16 microbatches": Case(2, 16, plan=STAGES, pattern=SEGMENTS),
    # Last, when no other state is left: these need the most memory.
    "one GPU, 64k": Case(1, 2, LONG, against=None),
    "context 2, ring, 64k": Case(2, 2, LONG, {"context": 2}, "one GPU, 64k"),
    "context 2, allgather, 64k": Case(2, 2, LONG, {"context": 2, "context_attention": "allgather"}, "one GPU, 64k"),
}  # fmt: skip


def one(turn: Turn, *, steps: int) -> dict[str, Any]:
    """Compiles a case, waits for its turn, and times it."""
    name = turn.name
    case = CASES[name]
    if case.against is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all cases are compiled at once
    import jax

    from orogen.bench.train import describe, prepare, summarise, timed
    from orogen.bench.workload import Workload
    from orogen.parallel.runtime import configure
    from orogen.report.profile import step_table

    configure()
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling takes is reported
    work = Workload(rows=case.rows, sequence_length=case.length, part="whole_step", bindings=case.bindings())
    config, trace = work.config(), turn.folder / "trace" / name.replace(" ", "_")
    began = time.perf_counter()
    compiled_s = 0.0

    def ready() -> None:
        nonlocal compiled_s
        compiled_s = time.perf_counter() - began
        turn.wait()

    prepared = prepare(work, config, ready=ready)
    facts = summarise(prepared, timed(prepared.start, steps), config)
    with jax.profiler.trace(str(trace)):
        for _ in range(2):
            jax.block_until_ready(prepared.start())
    table = step_table(trace, steps=2)
    return {
        "case": name, "against": case.against, "microbatches": case.microbatches, "pattern": case.pattern,
        "compiled_s": round(compiled_s, 1), **describe(work, config), **facts, "profile": table,
    }  # fmt: skip


def links(turn: Turn) -> list[dict[str, Any]]:
    """What NCCL's collectives take for LINK_BYTES per rank: the floor of what a step exchanges."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec

    from orogen.bench.timing import compiled, time_in_turn

    mesh = jax.make_mesh((2,), ("r",), devices=jax.devices()[:2])
    x = jax.device_put(
        jnp.zeros((2, LINK_BYTES // 2), jnp.bfloat16), jax.sharding.NamedSharding(mesh, PartitionSpec("r"))
    )
    functions = {
        "all-gather": lambda a: lax.all_gather(a[0], "r", tiled=True)[None, :1],
        "reduce-scatter": lambda a: lax.psum_scatter(a[0], "r", tiled=True)[None],
        "all-to-all": lambda a: lax.all_to_all(a.reshape(2, -1), "r", 0, 0, tiled=True),
        "permute": lambda a: lax.ppermute(a, "r", [(0, 1), (1, 0)]),
    }
    ranks = PartitionSpec("r")
    run = lambda f: compiled(jax.shard_map(f, mesh=mesh, in_specs=ranks, out_specs=ranks), x)  # noqa: E731
    programs = {name: run(function) for name, function in functions.items()}
    turn.wait()
    times = time_in_turn(programs, samples=5)
    # Of two ranks each sends the other its whole operand, or half of it.
    sent = {name: LINK_BYTES / (1 if name in ("all-gather", "permute") else 2) for name in functions}
    taken = {name: statistics.median(ms) for name, ms in times.items()}
    return [
        {"case": f"link, {name}", "ms": round(ms, 3), "gb_per_second": round(sent[name] / ms / 1e6, 1)}
        for name, ms in taken.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: time, rate, and the share of what two single GPUs would process."""
    rates = {row["case"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    lines = ["| plan | ms | tokens/s | of two GPUs | GB per GPU | exposed, idle ms |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["case"].startswith("link"):
            continue
        alone = rates.get(row["against"]) if row["against"] else None
        share = f"{row['tokens_per_second'] / 2 / alone:.1%}" if alone else ""
        of = lambda key, row=row: statistics.mean(each[key] for each in row["profile"]["devices"].values())  # noqa: E731
        waits = f"{of('exposed_ms'):.1f}, {of('idle_ms'):.1f}"
        lines.append(
            f"| {row['case']} | {row['ms']:.1f} | {row['tokens_per_second']:,} | {share} | {row['gb']} | {waits} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=[*CASES, "links"], default=[*CASES, "links"])
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "SCRATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        turn = Turn(options.one[0], Path(options.one[1]))
        turn.answer(links(turn) if turn.name == "links" else [one(turn, steps=options.steps)])
        return
    rows, failures = in_turn(options.cases, [sys.executable, __file__, "--steps", str(options.steps)])
    for name, why in failures.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    options.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(table(rows))
    for row in rows:
        if row["case"].startswith("link"):
            print(f"{row['case']}: {row['ms']} ms, {row['gb_per_second']} GB/s")


if __name__ == "__main__":
    main()
