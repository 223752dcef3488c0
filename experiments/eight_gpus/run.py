"""Eight GPUs of one host: `python experiments/eight_gpus/run.py --part nano|routed|scaling|verify|folding|context`.

Each case has a process of its own; all are compiled at once, then timed one after another, alone on the GPUs. A part
ends within ten minutes. Its rows go to `results_PART.jsonl` in the folder `--out`. `--predict` runs nothing and writes
what the simulator says; `--small` runs the same cases, of toy size, on eight simulated devices.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import PARTS, UNEVEN, Case, full_size, prediction
from plans import DEVICES, MEMORY_FRACTION, MEMORY_GIB
from routed import measure as measure_routed

from orogen.bench.turns import Results, Turn, in_turn
from orogen.config.files import write_atomically

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PREDICTED = HERE / "results_predicted.jsonl"
LIMIT_S = 570.0  # of a part
ROUTED = "routed"
VERIFIED, SEED = 10, 26  # random plans, and how they are drawn


def cases_of(part: str, hardware: str) -> dict[str, Case | None]:
    """The cases of a part; None for a plan that is verified, not timed."""
    if part == "verify":
        return {f"plan {number}": None for number in range(VERIFIED)}
    return dict(full_size(hardware) if part == ROUTED else PARTS[part](hardware))


def measure(turn: Turn, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one case."""
    if options.part == "verify":
        return _verified(turn, small=options.small)
    case = cases_of(options.part, options.hardware)[turn.name]
    assert case is not None
    run = case.config(small=options.small)
    _configure(run.plan.devices, small=options.small)
    facts: dict[str, Any] = {"part": options.part, "case": turn.name, "against": case.against}
    if options.part == ROUTED:
        counts = {"training": options.training, "timed": options.steps}
        return {**facts, **measure_routed(case, turn, **counts, small=options.small)}
    from orogen.bench.train import describe, prepare, summarise, timed

    began, compiled_s = time.perf_counter(), 0.0

    def ready() -> None:
        nonlocal compiled_s
        compiled_s = time.perf_counter() - began
        turn.wait()

    prepared = prepare(case.work, run, ready=ready)
    found = summarise(prepared, timed(prepared.start, options.steps), run)
    return {
        **facts, "routing": case.work.routing, "compiled_s": round(compiled_s, 1), **describe(case.work, run), **found
    }  # fmt: skip


def _verified(turn: Turn, *, small: bool) -> dict[str, Any]:
    """One random plan in float32 against one device, while the others run too."""
    _configure(DEVICES, small=small)
    sys.path.insert(0, str(ROOT))
    from tests.train.plans import describe, random_runs

    from orogen.train.verify import verify

    number = int(turn.name.removeprefix("plan "))
    model, run = random_runs(VERIFIED, seed=SEED, devices=DEVICES, short=small)[number]
    verdict = verify(run)
    return {
        "part": "verify", "case": turn.name, "model": model, "plan": describe(run.plan), "passed": verdict.passed,
        **verdict._asdict(),
    }  # fmt: skip


def _configure(devices: int, *, small: bool) -> None:
    """Shows this process its devices. Call it before anything asks jax for them."""
    if not small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all cases are compiled at once
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
    from orogen.parallel.runtime import configure

    configure(DEVICES if small else None)


def predictions() -> Results:
    """What the simulator says of all cases that are timed."""
    rows = []
    for hardware in MEMORY_GIB:
        for part in (*PARTS, ROUTED):
            uneven = part == ROUTED
            for name, case in cases_of(part, hardware).items():
                assert case is not None
                facts = {"part": part, "case": name, "routing": UNEVEN if uneven else "balanced"}
                rows.append({**facts, **prediction(case, hardware, uneven=uneven)})
    return rows


def table(rows: Results, predicted: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of a part that was timed, as Markdown. predicted: by case. `share`: the rate per GPU over that of the
    case it is compared with."""
    rates = {row["case"]: row["tokens_per_second"] / row["devices"] for row in rows}
    lines = ["| case | ms | predicted | tokens/s | MFU | predicted | GB | share |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        before, other = predicted.get(row["case"], {}), rates.get(row["against"])
        share = f"{rates[row['case']] / other:.1%}" if other else ""
        cells = (
            row["case"], f"{row['ms']:,.1f}", _cell(before, "ms", ",.1f"), f"{row['tokens_per_second']:,}",
            _cell(row, "mfu", ".1%"), _cell(before, "mfu", ".1%"), row.get("gb", ""), share,
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row.get(name)
    return "" if value is None else format(value, form)


def run(options: argparse.Namespace) -> int:
    """Measures a part. The exit status: 1 if a case failed."""
    names = list(cases_of(options.part, options.hardware))
    if unknown := set(options.cases or ()) - set(names):
        print(f"--cases {sorted(unknown)}; expected some of {names}", file=sys.stderr)
        return 2
    chosen = [name for name in names if name in (options.cases or names[: 1 if options.part == ROUTED else None])]
    command = [sys.executable, __file__, "--part", options.part, "--hardware", options.hardware]
    command += ["--steps", str(options.steps), "--training", str(options.training), *["--small"] * options.small]
    outcome = in_turn(chosen, command, limit_s=options.limit)
    options.out.mkdir(parents=True, exist_ok=True)
    _write(options.out / f"results_{options.part}.jsonl", outcome.results)
    for name, why in outcome.failures.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    if options.part == "verify":
        passed = sum(row["passed"] for row in outcome.results)
        print(f"{passed} of {len(chosen)} plans equal one device")
        return int(passed < len(chosen))
    known = [json.loads(line) for line in PREDICTED.read_text().splitlines()] if PREDICTED.is_file() else []
    of = {r["case"]: r for r in known if (r["part"], r["hardware"]) == (options.part, options.hardware)}
    print(table(outcome.results, {} if options.small else of))
    return int(bool(outcome.failures))


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description="Times training steps and plans on eight GPUs of one host.")
    parser.add_argument("--part", choices=(*PARTS, ROUTED, "verify"))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="of the part; default: all, the first of `routed`")
    parser.add_argument("--hardware", choices=tuple(MEMORY_GIB), default="h200", help="which plans and predictions")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--training", type=int, default=300, help="steps that train the routers first, of `routed`")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds after which a part is ended")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--small", action="store_true", help="toy sizes on eight simulated devices")
    parser.add_argument("--predict", action="store_true", help=f"only write {PREDICTED.name}")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.predict:
        _write(PREDICTED, predictions())
        return 0
    if options.part is None:
        parser.error("expected --part or --predict")
    if options.one:
        turn = Turn(options.one[0], Path(options.one[1]))
        turn.answer([measure(turn, options)])
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
