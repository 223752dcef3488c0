"""Memory of the full-size step as XLA lays it out for its card, which need not exist, beside the formulas: `python
experiments/eight_gpus/layout.py --plans h200_ragged` (extra cuda).

Each plan's line goes to `compiled.jsonl`, in place of an earlier one of the same plan, once XLA has laid out the
memory; no code is generated. cuDNN's workspaces, which XLA does not know without a GPU, are apart.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from plans import ALLOCATED, HERE, MODEL, config

from orogen.config.cluster import ClusterConfig
from orogen.config.files import write_atomically
from orogen.simulate.compiled import apart
from orogen.simulate.layout import laid_out
from orogen.simulate.predict import predict

RESULTS, COMPILER = HERE / "compiled.jsonl", "XLA:GPU without a GPU"
LIMIT_S = 3600.0
GB = 1e9


def line_of(plan: Path, *, limit_s: float) -> dict[str, Any]:
    """The line of a plan. Raises TimeoutError and RuntimeError as `laid_out` does."""
    import jax

    hardware = plan.stem.partition("_")[0]
    files = [part for file in (MODEL, HERE / "nano.gin", plan) for part in ("--gin_file", str(file))]
    command = [sys.executable, "-m", "orogen.cli", "simulate", *files]
    command += ["--gin_bindings", f"ClusterConfig.hardware={hardware!r}", "--compile", "gpu"]
    found = laid_out(command, limit_s=limit_s)
    parts, workspace = apart(predict(config(plan), ClusterConfig(hardware=hardware)).memory)
    return {
        "plan": plan.stem, "hardware": hardware, "compiler": f"{COMPILER}, jax {jax.__version__}",
        "formulas": {name: round(size) for name, size in parts.items()}, "formulas_bytes": round(sum(parts.values())),
        "workspace_bytes": round(workspace), "laid_out_bytes": found.bytes, "seconds": round(found.seconds),
        "processor_seconds": round(found.processor_seconds), "process_peak_bytes": found.peak_bytes,
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown. `room`: what the allocator has beside the step and cuDNN."""
    rows = ["| plan | formulas GB | XLA:GPU GB | difference | cuDNN GB | room GB |", "|---|---|---|---|---|---|"]
    for line in lines:
        analytic, laid, work = (line[f"{name}_bytes"] for name in ("formulas", "laid_out", "workspace"))
        room = ALLOCATED[line["hardware"]] * 2**30 - laid - work
        numbers = (
            f"{analytic / GB:.1f} | {laid / GB:.1f} | {analytic / laid - 1:+.1%} | {work / GB:.1f} | {room / GB:.1f}"
        )
        rows.append(f"| {line['plan']} | {numbers} |")
    return "\n".join(rows)


def main() -> int:
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    parser = argparse.ArgumentParser(description="Lays out the memory of the full-size step for GPUs.")
    names = sorted(path.stem for path in HERE.glob("h?00_*.gin"))
    parser.add_argument("--plans", nargs="*", default=names, choices=names)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for each plan")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    options, failed = parser.parse_args(), False
    for name in () if options.table else options.plans:
        try:
            line = line_of(HERE / f"{name}.gin", limit_s=options.limit)
        except (TimeoutError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        known = [row for row in known if (row["plan"], "laid_out_bytes" in row) != (name, True)] + [line]
        write_atomically(RESULTS, "".join(f"{json.dumps(row)}\n" for row in known).encode())
    print(table([row for row in known if "formulas_bytes" in row]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
