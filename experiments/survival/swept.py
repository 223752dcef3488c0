"""A sweep of 36 runs whose processes are killed at random moments: is any run lost, or run twice?

Each kill is a SIGKILL, of the sweep or of one of the trainings that it has started. A sweep that is gone is called
again. `PYTHONPATH=src:. python experiments/survival/swept.py --kills 20 --at_once 4` writes one line per kill to
swept.jsonl, and a last one that says what is left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.train import kills

from orogen.report.metrics import read_metrics

MATRIX = {
    "rate": {str(k): [f"OptimizerConfig.learning_rate = {k}e-3"] for k in (1, 2, 4, 8)},
    "width": {str(k): [f"ModelConfig.intermediate_size = {k}"] for k in (10, 14, 18)},
}
SEEDS = (1, 2, 3)
COUNT, STEPS = 36, 12


class Sweep:
    """The calls of `orogen sweep` on one folder."""

    def __init__(self, study: Path, folder: Path, at_once: int):
        self.folder = folder
        self._command = [sys.executable, "-m", "orogen.cli", "sweep", "--gin_file", str(study), "--run", str(folder)]
        self._command += ["--at_once", str(at_once)]
        self._log = folder.with_suffix(".log").open("ab")
        self.calls = 0

    def call(self) -> subprocess.Popen[bytes]:
        self.calls += 1
        return subprocess.Popen(self._command, stdout=self._log, stderr=self._log)

    def done(self) -> dict[str, dict[str, Any]]:
        """The results by run. Raises ValueError if one has two lines."""
        file = self.folder / "results.jsonl"
        whole = file.read_text() if file.exists() else ""
        lines = [json.loads(line) for line in whole.splitlines(keepends=True) if line.endswith("\n")]
        found = {line["run"]: line for line in lines}
        if len(found) < len(lines):
            raise ValueError(f"{file} has {len(lines)} lines of {len(found)} runs; expected one of each")
        return found

    def written(self, run: str) -> int:
        """When the run's metrics were written last."""
        return (self.folder / "runs" / run / "metrics.jsonl").stat().st_mtime_ns


def children(process: int) -> list[int]:
    """The processes that this one has started and that live."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def trials(sweep: Sweep, count: int, longest: float, rng: random.Random) -> list[dict[str, Any]]:
    """Calls the sweep until it ends well, with `count` kills on the way, `longest` seconds apart at most; a line per
    kill, and a last one. Raises RuntimeError if it does not end well once nothing is killed."""
    told, process, seen, begun = [], sweep.call(), {}, time.monotonic()
    while True:
        until = time.monotonic() + rng.uniform(0.0, longest)
        while process.poll() is None and (time.monotonic() < until or len(told) == count):
            time.sleep(0.01)
        for run in sweep.done().keys() - seen.keys():
            seen[run] = sweep.written(run)
        if (status := process.poll()) is not None:
            if status == 0:
                break
            if sweep.calls > 3 * count + 3:
                raise RuntimeError(f"call {sweep.calls} ended with status {status}")
            process = sweep.call()
            continue
        victims = {"training": children(process.pid), "sweep": [process.pid]}
        what = rng.choice([name for name, found in victims.items() if found])
        try:
            os.kill(rng.choice(victims[what]), signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            continue
        told.append({"killed": what, "after": round(time.monotonic() - begun, 2), "done": len(seen)})
    again = [run for run, when in seen.items() if sweep.written(run) != when]
    return [*told, {"calls": sweep.calls, "runs": len(seen), "run_again": again}]


def twice(sweep: Sweep) -> list[str]:
    """Runs whose metrics do not have each step once."""
    steps = list(range(1, STEPS + 1))
    return [run for run in sweep.done() if [r["step"] for r in read_metrics(sweep.folder / "runs" / run)] != steps]


def study(folder: Path, seeds: tuple[int, ...]) -> Path:
    recipe = kills.write_recipe(folder, kills.MLP.replace("ModelConfig.intermediate_size = 10\n", ""))
    text = "".join(line for line in recipe.read_text().splitlines(keepends=True) if "learning_rate" not in line)
    text += "OptimizerConfig.learning_rate = 3e-3\nModelConfig.intermediate_size = 10\nTrainConfig.loggers = ()\n"
    text += f"SweepConfig.matrix = {MATRIX}\nSweepConfig.control = ('1', '10')\nSweepConfig.seeds = {seeds}\n"
    file = folder / "study.gin"
    file.write_text(text)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--at_once", type=int, default=2, help="runs at a time")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds between kills, at most")
    parser.add_argument("--calm", type=int, default=len(SEEDS), help="seeds of the sweep that nobody kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "swept.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, few = (study(Path(scratch) / name, SEEDS[:seeds]) for name, seeds in (("a", 3), ("b", options.calm)))
        killed, calm = (Sweep(file, file.parent / "sweep", options.at_once) for file in (whole, few))
        lines = trials(killed, options.kills, options.longest, random.Random(options.seed))
        if calm.call().wait():
            raise SystemExit("the sweep that nobody kills did not end well")
        expected, found = calm.done(), killed.done()
        differ = [run for run in expected if found.get(run, {}).get("value") != expected[run]["value"]]
        lines[-1] |= {"steps_twice": twice(killed), "other_value": differ, "compared": len(expected)}
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(json.dumps(lines[-1]))
    bad = lines[-1]["run_again"] or lines[-1]["steps_twice"] or differ or len(found) != COUNT
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
