"""Whole training steps on two GPUs of one host, beside one GPU: `python experiments/two_gpus/run.py`.

Each plan is compiled by a process of its own, all at once; then they are timed one after another, alone on the GPUs.
The model has R1's widths and the pattern MEMEM*E. Results go to `results.jsonl` beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PATTERN = "MEMEM*E"
PATIENCE = 600.0  # seconds that a plan waits for the others' compilation before it is timed
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


def one(name: str, scratch: Path, *, cases: Sequence[str], steps: int) -> dict[str, Any]:
    """Compiles a case, waits for its turn, and times it."""
    case = CASES[name]
    if case.against is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(list(CASES).index(name) % 2)  # their states share the memory
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all cases hold their states at once
    import jax

    from orogen.bench.train import describe, prepare, summarise, timed
    from orogen.bench.workload import Workload
    from orogen.parallel.runtime import configure
    from orogen.report.profile import step_table

    configure()
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling takes is reported
    work = Workload(rows=case.rows, sequence_length=case.length, part="whole_step", bindings=case.bindings())
    config, trace = work.config(), scratch / "trace" / name.replace(" ", "_")
    began = time.perf_counter()
    compiled_s = 0.0

    def ready() -> None:
        nonlocal compiled_s
        compiled_s = time.perf_counter() - began
        wait_for_turn(scratch, name, cases)

    prepared = prepare(work, config, ready=ready)
    facts = summarise(prepared, timed(prepared.start, steps), config)
    with jax.profiler.trace(str(trace)):
        for _ in range(2):
            jax.block_until_ready(prepared.start())
    (scratch / "done" / name).touch()
    table = step_table(trace, steps=2)
    return {
        "case": name, "against": case.against, "microbatches": case.microbatches, "pattern": case.pattern,
        "compiled_s": round(compiled_s, 1), **describe(work, config), **facts, "profile": table,
    }  # fmt: skip


def wait_for_turn(scratch: Path, name: str, cases: Sequence[str]) -> None:
    """Returns once all cases are compiled and those before this one are done: it then has the GPUs for itself."""
    (scratch / "ready" / name).touch()
    began = time.monotonic()
    earlier = cases[: cases.index(name)]
    while not (set(cases) <= _names(scratch / "ready") and set(earlier) <= _names(scratch / "done")):
        if time.monotonic() - began > PATIENCE:
            raise TimeoutError(f"{name} waited {PATIENCE:g} s for the other cases")
        time.sleep(0.2)


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def links(scratch: Path, *, cases: Sequence[str]) -> list[dict[str, Any]]:
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
    wait_for_turn(scratch, "links", cases)
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
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in ("ready", "done", "rows", "log"):
            (scratch / name).mkdir()
        common = [sys.executable, __file__, "--steps", str(options.steps), "--cases", *options.cases]
        children = {}
        for name in options.cases:
            log = (scratch / "log" / name).open("w")
            children[name] = subprocess.Popen([*common, "--one", name, folder], stdout=log, stderr=log)
        for name, process in children.items():
            if process.wait():
                last = (scratch / "log" / name).read_text().strip().splitlines()[-1:]
                print(f"{name} failed: {' '.join(last)}", file=sys.stderr)
        rows = [json.loads(line) for name in options.cases for line in _lines(scratch / "rows" / name)]
    options.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(table(rows))
    for row in rows:
        if row["case"].startswith("link"):
            print(f"{row['case']}: {row['ms']} ms, {row['gb_per_second']} GB/s")


def child(options: argparse.Namespace) -> None:
    """Measures one case; the others do not wait for one that fails."""
    name, scratch = options.one[0], Path(options.one[1])
    try:
        if name == "links":
            found = links(scratch, cases=options.cases)
        else:
            found = [one(name, scratch, cases=options.cases, steps=options.steps)]
        (scratch / "rows" / name).write_text("".join(f"{json.dumps(row)}\n" for row in found))
    finally:
        for folder in ("ready", "done"):
            (scratch / folder / name).touch()


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


if __name__ == "__main__":
    main()
