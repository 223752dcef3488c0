"""`results.jsonl` of a sweep: one line per run that is done, written once."""

import json
import os
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.report.metrics import read_metrics
from orogen.sweep.plan import Run

NAME = "results.jsonl"


class Results:
    """The lines of a sweep's results, by the run's name. Raises ConfigError if the file holds anything else."""

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._lines: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return
        whole = self._path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]  # a process that was killed may have left part of a line
        for number, line in enumerate(kept.decode(errors="replace").splitlines(), 1):
            try:
                result = json.loads(line)
                self._lines[result["run"]] = result
            except (ValueError, TypeError, KeyError):
                raise ConfigError(f"{self._path}:{number}: {line[:80]!r}; expected a result of a run") from None
        if kept != whole:
            write_atomically(self._path, kept)

    def of(self, run: Run) -> dict[str, Any] | None:
        """The result of the run; None if it is not done. Raises ConfigError if its config has changed since."""
        result = self._lines.get(run.name)
        if result is not None and result.get("config") != run.hash:
            raise ConfigError(
                f"{self._path} has a result of {run.name} with another config; expected an equal one, or another folder"
            )
        return result

    def add(self, run: Run, facts: dict[str, Any]) -> None:
        """Appends the result of a run, on the disk when this returns."""
        result = {
            "run": run.name, "arm": list(run.arm.values), "search": run.search, "seed": run.config.train.seed,
            "learning_rate": run.config.optimizer.learning_rate, "config": run.hash, "steps": run.config.train.steps,
            "tokens": run.tokens, "flops": run.flops, **facts,
        }  # fmt: skip
        with self._path.open("ab") as file:
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines[run.name] = result


def read_run(folder: Path, run: Run, metric: str) -> dict[str, Any] | None:
    """What a run folder says of a finished run: its metric, the seconds of its steps, versions. None while the run has
    not ended. Raises ConfigError if it ended without the metric."""
    if not (folder / "report.html").is_file():  # the last thing that a run writes
        return None
    records = read_metrics(folder)
    if not records or records[-1]["step"] < run.config.train.steps:
        return None
    numbers = {key for record in records for key, x in record.items() if type(x) in (int, float)}
    values = [record[metric] for record in records if type(record.get(metric)) in (int, float)]
    if not values:
        raise ConfigError(f"{folder} has no number {metric!r}; expected one of {sorted(numbers)}")
    facts = json.loads((folder / "env.json").read_text())
    return {
        "metric": metric, "value": values[-1], "seconds": round(sum(r.get("step_ms", 0.0) for r in records) / 1e3, 3),
        "parameters": facts["parameters"]["total"], "commit": facts["commit"], "packages": facts["packages"],
        "devices": facts["devices"],
    }  # fmt: skip
