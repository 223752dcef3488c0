"""Eight GPUs of one host: `python experiments/eight_gpus/run.py --part nano|routed|scaling|verify|folding|context`.

Each case has a process of its own; all are compiled at once, then timed one after another, alone on the GPUs. A part
ends within ten minutes. Whenever a case has ended, its row goes to `results_PART.jsonl` in the folder `--out`, which
keeps the rows of earlier calls that this one does not measure again; what a case that fails has printed goes to
`failed_PART`. `--predict` runs nothing and writes what the simulator says; `--small` runs the same cases, of toy size,
on eight simulated devices, one after another, and writes `small_PART.jsonl`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cases import PARTS, UNEVEN, Case, full_size, prediction
from plans import DEVICES, MEMORY_FRACTION, MEMORY_GIB
from routed import measure as measure_routed

from orogen.bench.turns import Outcome, Results, Turn, in_turn
from orogen.command import EXIT_BAD_INPUT, positive
from orogen.config.files import write_atomically

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PREDICTED = HERE / "results_predicted.jsonl"
BEGAN = time.monotonic()
LIMIT_S = 570.0  # of a part
ROUTED = "routed"
VERIFIED, SEED = 10, 26  # random plans, and how they are drawn
SMALL_TOGETHER = 1  # cases of toy size that run at once
QUICK = "--xla_backend_optimization_level=0"  # of toy size, nearly all the time goes into compiling
# Prints how many devices a process here has, and of which kind.
COUNT = "import jax; print(jax.device_count(), jax.default_backend())"
COUNT_S = 120.0  # after which no answer is expected any more


def cases_of(part: str, hardware: str) -> dict[str, Case | None]:
    """The cases of a part; None for a plan that is verified, not timed."""
    if part == "verify":
        return {f"plan {number}": None for number in range(VERIFIED)}
    return dict(full_size(hardware) if part == ROUTED else PARTS[part](hardware))


def measure(turn: Turn, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one case."""
    facts: dict[str, Any] = {"part": options.part, "case": turn.name, "hardware": options.hardware}
    if options.part == "verify":
        return {**facts, **_verified(turn, small=options.small)}
    case = cases_of(options.part, options.hardware)[turn.name]
    assert case is not None
    run = case.config(small=options.small)
    _configure(run.plan.devices, small=options.small)
    facts["against"] = case.against
    if options.part == ROUTED:
        counts = {"training": options.training, "timed": options.steps, "ends": BEGAN + options.limit}
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
    return {"model": model, "plan": describe(run.plan), "passed": verdict.passed, **verdict._asdict()}


def _configure(devices: int, *, small: bool) -> None:
    """Shows this process its devices. Call it before anything asks jax for them."""
    if not small:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = given.split(",") if given else list(map(str, range(devices)))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:devices])
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all cases are compiled at once
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
    else:
        os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
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
    """Measures a part. The exit status: 1 if a case failed, 2 for bad input."""
    cases = cases_of(options.part, options.hardware)
    if unknown := set(options.cases or ()) - set(cases):
        print(f"--cases {sorted(unknown)}; expected some of {list(cases)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    chosen = [name for name in cases if name in (options.cases or list(cases)[: 1 if options.part == ROUTED else None])]
    if not options.small and (lacking := _lacking({name: cases[name] for name in chosen})):
        print(f"--part {options.part}: {lacking}", file=sys.stderr)
        return EXIT_BAD_INPUT
    outcome = _measured(chosen, options)
    if options.part == "verify":
        passed = sum(row["passed"] for row in outcome.results)
        print(f"{passed} of {len(chosen)} plans equal one device")
        return int(passed < len(chosen))
    known = _read(PREDICTED)
    of = {r["case"]: r for r in known if (r["part"], r["hardware"]) == (options.part, options.hardware)}
    print(table(outcome.results, {} if options.small else of))
    return int(bool(outcome.failures))


def _lacking(chosen: Mapping[str, Case | None]) -> str | None:
    """Which cases need more GPUs than this host has, in words; None if none does."""
    found, why = _found()
    needed = {name: case.config().plan.devices if case else DEVICES for name, case in chosen.items()}
    large = [name for name, devices in needed.items() if devices > found]
    if not large:
        return None
    some = ", ".join(large[:3]) + (f" and {len(large) - 3} more" if len(large) > 3 else "")
    lacking = f"expected {max(needed.values())} GPUs, found {found}, too few for {some}; --cases takes others"
    return f"{lacking} ({why})" if why else lacking


def _found() -> tuple[int, str]:
    """How many GPUs a process here finds, and what it says if it ends with an error, or does not count GPUs."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", COUNT]
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=COUNT_S
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 0, f"counting them took longer than {COUNT_S:g} s"
    said = (child.stderr.strip().splitlines() or ["nothing was printed"])[-1]
    if child.returncode:
        return 0, f"counting them ended with exit status {child.returncode}: {said}"
    count, kind = child.stdout.split()[-2:]
    return (int(count), "") if kind == "gpu" else (0, f"devices are of kind {kind}: {said}")


def _measured(chosen: Sequence[str], options: argparse.Namespace) -> Outcome:
    """Runs the cases, as many at once as `--together` says; writes each row when its case has ended, and prints what
    failed."""
    name = f"{'small' if options.small else 'results'}_{options.part}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    earlier = _read(options.out / name)
    call = 1 + max((row.get("call", 0) for row in earlier), default=0)
    found = Outcome([], {})

    def keep(outcome: Outcome) -> None:
        rows = [*found.results, *({**row, "call": call} for row in outcome.results)]
        merged = {(row["case"], row["hardware"]): row for row in (*earlier, *rows)}
        if merged:
            _write(options.out / name, list(merged.values()))

    together = options.together or (SMALL_TOGETHER if options.small else len(chosen))
    for first in range(0, len(chosen), together):
        left = options.limit - (time.monotonic() - BEGAN)
        group = chosen[first : first + together]
        if left <= 0:
            failures = dict.fromkeys(group, f"not begun within the limit of {options.limit:g} s")
            found = Outcome(found.results, {**found.failures, **failures})
            continue
        outcome = in_turn(
            group, _command(options, left), limit_s=left, ended=keep, logs=options.out / f"failed_{options.part}"
        )
        found = Outcome([*found.results, *outcome.results], {**found.failures, **outcome.failures})
    for case, why in found.failures.items():
        print(f"{case} failed: {why}", file=sys.stderr)
    return found


def _command(options: argparse.Namespace, limit_s: float) -> list[str]:
    """What runs one case in a process of its own, which has so many seconds."""
    command = [sys.executable, __file__, "--part", options.part, "--hardware", options.hardware]
    command += ["--steps", str(options.steps), "--training", str(options.training), "--limit", str(limit_s)]
    return [*command, *["--small"] * options.small]


def _read(file: Path) -> Results:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(file, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, without the usage."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}\n")


def _options() -> argparse.Namespace:
    parser = _Parser(description="Times training steps and plans on eight GPUs of one host.")
    parser.add_argument("--part", choices=(*PARTS, ROUTED, "verify"))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="of the part; default: all, the first of `routed`")
    parser.add_argument("--hardware", choices=tuple(MEMORY_GIB), default="h200", help="which plans and predictions")
    parser.add_argument("--steps", type=positive, default=6, help="steps that are timed")
    parser.add_argument(
        "--training", type=positive, default=300, help="steps that train the routers first, of `routed`, if time allows"
    )
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds after which a part is ended")
    parser.add_argument(
        "--together", type=positive, help="cases that are compiled at once; default: all, with --small one"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--small", action="store_true", help="toy sizes on eight simulated devices")
    parser.add_argument("--predict", action="store_true", help=f"only write {PREDICTED.name}")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None and not options.predict:
        parser.error("expected --part or --predict")
    return options


def main() -> int:
    options = _options()
    if options.predict:
        _write(PREDICTED, predictions())
        return 0
    if options.one:
        turn = Turn(options.one[0], Path(options.one[1]))
        turn.answer([measure(turn, options)])
        return 0
    # Ended from outside, it ends its cases too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(options)
    except KeyboardInterrupt:
        print(f"--part {options.part}: interrupted; the rows of the cases that ended are kept", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
