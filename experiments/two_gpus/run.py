"""Whole training steps on two GPUs of one host, beside one GPU: `python experiments/two_gpus/run.py`.

Each plan has a process of its own. As many as `--together` are compiled at once, then timed one after another, alone on
the GPUs; only the one that is timed has a state. They share XLA's choices of kernels, so that equal products take
equally long under all plans. The model has R1's widths and the pattern MEMEM*E. Results go to `results.jsonl` beside
this file.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from orogen.bench.turns import Turn, in_turn

HERE = Path(__file__).parent
PATTERN = "MEMEM*E"
TRACED = 2  # steps
PARSERS = 8  # processes that read traces
LINK_BYTES = 402_653_184  # of each rank's operand: 98,304 rows of 2048 numbers of 16 bits


class Case(NamedTuple):
    """A plan and its batch. rows: sequences per microbatch of all GPUs; microbatches; length: tokens per sequence;
    plan: bindings of PlanConfig; against: the case on one GPU with which it is compared, None for such a case itself.
    pattern: the layers, perhaps split into segments. routing: as in `Workload`. flags: XLA's, beside the usual ones.
    """

    rows: int
    microbatches: int = 4
    length: int = 8192
    plan: dict[str, Any] = {}
    against: str | None = "one GPU"
    pattern: str = PATTERN
    routing: str = "real"
    flags: tuple[str, ...] = ()

    def bindings(self) -> tuple[str, ...]:
        """Gin bindings of the benchmark."""
        plan = {"unroll": 2, "microbatches": self.microbatches, **self.plan}
        return (
            f"ModelConfig.pattern={self.pattern!r}",
            *(f"PlanConfig.{name}={value!r}" for name, value in plan.items()),
        )


ZERO_1 = {"data": 2, "fsdp": "optimizer"}
ZERO_3 = {"data": 2, "fsdp": "parameters"}
EXPERT = {**ZERO_1, "expert": 2}
ALLTOALL = {**EXPERT, "dispatch": "alltoall"}
RAGGED = {**EXPERT, "dispatch": "ragged"}
TENSOR = {"tensor": 2}
# With half of the vocabulary, twice as many tokens' logits fit.
TENSOR_ZERO = {**TENSOR, "fsdp": "optimizer", "logit_rows": 8192}
FOLDED = {"tensor": 2, "expert": 2}
EAGER = {"stage": 2, "schedule": "eager_1f1b"}
INTERLEAVED = {"stage": 2, "schedule": "interleaved"}
# Segments 0 and 1 work at the same ticks, and so do 2 and 3: each pair has to take equally long.
SEGMENTS = "ME|ME|M*|E"
LONG = 65_536
GATHERED = {"context": 2, "context_attention": "allgather"}
# XLA hides a step's kernels from the profiler if it puts them into CUDA graphs.
KERNELS = ("--xla_gpu_enable_command_buffer=",)
# Kernels of libraries read slices of larger arrays in place.
SLICED = ("--xla_gpu_enable_dynamic_slice_fusion=true",)
CASES = {
    "one GPU": Case(2, against=None),
    "one GPU, 2 microbatches": Case(4, 2, against=None),
    "data 2, ZeRO-1": Case(4, plan=ZERO_1),
    "data 2, ZeRO-3": Case(4, plan=ZERO_3),
    "data 2, ZeRO-3, 2 microbatches": Case(8, 2, plan=ZERO_3, against="one GPU, 2 microbatches"),
    "expert 2, allgather": Case(4, plan=EXPERT),
    "expert 2, allgather, balanced": Case(4, plan=EXPERT, routing="balanced"),
    "expert 2, alltoall, capacity 1.25": Case(4, plan={**ALLTOALL, "capacity_factor": 1.25}),
    "expert 2, alltoall, interleaved": Case(4, plan={**ALLTOALL, "capacity_factor": 1.25, "interleave": 2}),
    "expert 2, alltoall, capacity 1, balanced": Case(4, plan={**ALLTOALL, "capacity_factor": 1.0}, routing="balanced"),
    "expert 2, ragged, buffer 1.5": Case(4, plan={**RAGGED, "buffer_factor": 1.5}),
    "expert 2, ragged, buffer 1, balanced": Case(4, plan={**RAGGED, "buffer_factor": 1.0}, routing="balanced"),
    "tensor 2": Case(4, plan=TENSOR),
    "tensor 2, ZeRO-1": Case(4, plan=TENSOR_ZERO),
    "tensor 2, ZeRO-1, interleaved": Case(4, plan={**TENSOR_ZERO, "interleave": 2}),
    "tensor 2, expert 2, allgather": Case(4, plan=FOLDED),
    "tensor 2, expert 2, interleaved": Case(4, plan={**FOLDED, "interleave": 2, "logit_rows": 8192}),
    "stage 2, 1F1B, 8 microbatches": Case(2, 8, plan={"stage": 2}),
    "stage 2, 1F1B, 16 microbatches": Case(2, 16, plan={"stage": 2}),
    "stage 2, eager 1F1B, 8 microbatches": Case(2, 8, plan=EAGER),
    "stage 2, eager 1F1B, 16 microbatches": Case(2, 16, plan=EAGER),
    "stage 2, interleaved, 8 microbatches": Case(2, 8, plan=INTERLEAVED, pattern=SEGMENTS),
    "stage 2, interleaved, 16 microbatches": Case(2, 16, plan=INTERLEAVED, pattern=SEGMENTS),
    "one GPU, by kernels": Case(2, against=None, flags=KERNELS),
    "tensor 2, by kernels": Case(4, plan=TENSOR, flags=KERNELS, against="one GPU, by kernels"),
    "stage 2, 1F1B, by kernels": Case(2, 8, plan={"stage": 2}, flags=KERNELS, against="one GPU, by kernels"),
    "stage 2, 1F1B, sliced operands": Case(2, 8, plan={"stage": 2}, flags=SLICED),
    "context 2, ring, 8k": Case(4, plan={"context": 2}),
    "context 2, allgather, 8k": Case(4, plan=GATHERED),
    # Last, when no other state is left: these need the most memory.
    "one GPU, 64k": Case(1, 2, LONG, against=None),
    "context 2, ring, 64k": Case(2, 2, LONG, {"context": 2}, "one GPU, 64k"),
    "context 2, allgather, 64k": Case(2, 2, LONG, GATHERED, "one GPU, 64k"),
    "one GPU, 128k": Case(1, 1, 2 * LONG, against=None),
    "context 2, ring, 128k": Case(2, 1, 2 * LONG, {"context": 2}, "one GPU, 128k"),
    "context 2, allgather, 128k": Case(2, 1, 2 * LONG, GATHERED, "one GPU, 128k"),
}  # fmt: skip
LINKS = "links"


def prepare_process(case: Case | None, scratch: Path) -> None:
    """Shows this process its GPUs, and the choices of kernels that others have made. Call it before jax is imported."""
    if case is not None and case.against is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several cases are compiled at once
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    flags = f"--xla_gpu_per_fusion_autotune_cache_dir={scratch / 'kernels'}", *(case.flags if case else ())
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()


def one(turn: Turn, scratch: Path, *, steps: int) -> dict[str, Any]:
    """Compiles a case, waits for its turn, and times it. `trace`: the folder of the trace of two more steps."""
    case = CASES[turn.name]
    prepare_process(case, scratch)
    import jax

    from orogen.bench.train import describe, prepare, summarise, timed
    from orogen.bench.workload import Workload
    from orogen.parallel.runtime import configure

    configure()
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling takes is reported
    work = Workload(
        rows=case.rows, sequence_length=case.length, part="whole_step", bindings=case.bindings(), routing=case.routing
    )
    config, trace = work.config(), scratch / "trace" / turn.name.replace(" ", "_")
    began = time.perf_counter()
    compiled_s = 0.0

    def ready() -> None:
        nonlocal compiled_s
        compiled_s = time.perf_counter() - began
        turn.wait()

    prepared = prepare(work, config, ready=ready)
    facts = summarise(prepared, timed(prepared.start, steps), config)
    with jax.profiler.trace(str(trace)):
        for _ in range(TRACED):
            jax.block_until_ready(prepared.start())
    return {
        "case": turn.name, "against": case.against, "microbatches": case.microbatches, "pattern": case.pattern,
        "routing": case.routing, "flags": case.flags, "compiled_s": round(compiled_s, 1), **describe(work, config),
        **facts, "trace": str(trace),
    }  # fmt: skip


def profiled(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the table of its trace in place of the trace's folder."""
    from orogen.report.profile import step_table

    found = {key: value for key, value in row.items() if key != "trace"}
    return found | ({"profile": step_table(Path(row["trace"]), steps=TRACED)} if "trace" in row else {})


def links(turn: Turn, scratch: Path) -> list[dict[str, Any]]:
    """What NCCL's collectives take for LINK_BYTES per rank: the floor of what a step exchanges."""
    prepare_process(None, scratch)
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


def measured(names: Sequence[str], options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The rows of the cases, whose failures are printed. Rows are written as soon as those compiled together ended."""
    rows, ends = [], time.monotonic() + options.limit
    command = [sys.executable, __file__, "--steps", str(options.steps), "--scratch", str(scratch)]
    with ProcessPoolExecutor(PARSERS) as pool:
        for first in range(0, len(names), options.together):
            together = names[first : first + options.together]
            if (left := ends - time.monotonic()) <= 0:
                print(f"not measured, for lack of time: {', '.join(together)}", file=sys.stderr)
                continue
            found, failures = in_turn(together, command, limit_s=left, ready_s=options.ready)
            for name, why in failures.items():
                print(f"{name} failed: {why}", file=sys.stderr)
            rows += pool.map(profiled, found)
            options.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", choices=[*CASES, LINKS], default=[*CASES, LINKS])
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--together", type=int, default=16, help="cases that are compiled at once")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which the rest is not measured")
    parser.add_argument("--ready", type=float, help="seconds within which a case has to be compiled")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        turn = Turn(options.one[0], Path(options.one[1]))
        links_asked = turn.name == LINKS
        turn.answer(links(turn, options.scratch) if links_asked else [one(turn, options.scratch, steps=options.steps)])
        return
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "kernels").mkdir()
        rows = measured(options.cases, options, Path(scratch))
    print(table(rows))
    for row in rows:
        if row["case"].startswith("link"):
            print(f"{row['case']}: {row['ms']} ms, {row['gb_per_second']} GB/s")


if __name__ == "__main__":
    main()
