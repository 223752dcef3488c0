"""`results.jsonl` of a sweep: one line per run that is done, written once."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.report.lost import ROLL_BACK, read_lost
from orogen.report.metrics import FILE_NAME, read_metrics
from orogen.report.series import Records, load_violation
from orogen.sweep.plan import Run
from orogen.train.health import SPIKE

NAME = "results.jsonl"
# Numbers that are computed from all records of a run.
TOGETHER: dict[str, Callable[[Records], float | None]] = {"load_violation": load_violation}


class Results:
    """The lines of a sweep's results, by the run's name. Raises ConfigError if the file holds anything else.

    numbers: those that a result must have; one without them is read again from the run's folder.
    """

    def __init__(self, folder: Path, numbers: Sequence[str] = ()):
        self._path, self._numbers = folder / NAME, numbers
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
        """The result of the run, the first of `numbers` as its value; None if it is not done, or lacks one of them.
        Raises ConfigError if its config has changed since."""
        result = self._lines.get(run.name)
        if result is not None and result.get("config") != run.hash:
            raise ConfigError(
                f"{self._path} has a result of {run.name} with another config; expected an equal one, or another folder"
            )
        if result is None or not self._numbers:
            return result
        known = numbers_of(result)
        if not all(name in known for name in self._numbers):
            return None
        return {**result, "metric": self._numbers[0], "value": known[self._numbers[0]]}

    def add(self, run: Run, facts: dict[str, Any]) -> None:
        """Adds the result of a run, in place of one that lacks a number; on the disk when this returns."""
        result = {
            "run": run.name, "arm": list(run.arm.values), "search": run.search, "seed": run.config.train.seed,
            "learning_rate": run.config.optimizer.learning_rate, "config": run.hash, "steps": run.config.train.steps,
            "tokens": run.tokens, "flops": run.flops,
            **({"checkpoint": run.checkpoint} if run.checkpoint else {}), **facts,
        }  # fmt: skip
        replaced = run.name in self._lines
        self._lines[run.name] = result
        if replaced:
            return write_atomically(self._path, b"".join(map(_line, self._lines.values())))
        with self._path.open("ab") as file:
            file.write(_line(result))
            file.flush()
            os.fsync(file.fileno())


def _line(result: Mapping[str, Any]) -> bytes:
    return json.dumps(result).encode() + b"\n"


def numbers_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a result by name: its metric and the further ones; None of a search that diverged."""
    return {result["metric"]: result["value"], **result.get("further", {})}


def read_run(folder: Path, run: Run, numbers: Sequence[str]) -> dict[str, Any] | None:
    """The result in a finished run's folder: its numbers, the first as its value; the seconds of its steps; versions. A
    run of the search also counts as finished if it diverged; its numbers are then None. Returns None while the run has
    not ended. Raises ConfigError if it ended without one of the numbers."""
    records = read_metrics(folder) if (folder / FILE_NAME).is_file() else []
    # The report is the last thing that a run writes.
    whole = bool(records) and (folder / "report.html").is_file() and records[-1]["step"] >= run.config.train.steps
    if not whole and not (run.search and _diverged(folder, records, run)):
        return None
    found = {name: _number(folder, records, name) if whole else None for name in numbers}
    metric, *further = numbers
    facts = json.loads((folder / "env.json").read_text())
    return {
        "metric": metric, "value": found[metric],
        **({"further": {name: found[name] for name in further}} if further else {}),
        "seconds": round(sum(r.get("step_ms", 0.0) for r in records) / 1e3, 3),
        "parameters": facts["parameters"]["total"], "commit": facts["commit"], "packages": facts["packages"],
        "devices": facts["devices"],
    }  # fmt: skip


def _diverged(folder: Path, records: Records, run: Run) -> bool:
    """Whether the run stopped because of its last steps, as it would again: too many in a row were skipped, or were bad
    after `max_roll_backs` to the checkpoint before them."""
    train = run.config.train
    skipped = [0, *(record.get("skipped_steps", 0) for record in records)]
    if records and skipped[-1] - skipped[-train.max_skipped_steps - 1 :][0] >= train.max_skipped_steps:
        return True
    if not 0 < train.roll_back_after <= len(records):
        return False
    bad = [now > before or SPIKE in record
           for now, before, record in zip(skipped[1:], skipped, records, strict=False)]  # fmt: skip
    place = records[-1]["step"] - train.checkpoint_every  # the last regular checkpoint is not before it
    backs = Counter(loss.to for loss in read_lost(folder) if loss.cause == ROLL_BACK and loss.to >= place)
    return all(bad[-train.roll_back_after :]) and max(backs.values(), default=0) >= train.max_roll_backs


def _number(folder: Path, records: Sequence[Mapping[str, Any]], name: str) -> float:
    """The last number of that name in the records, or one that they give together."""
    if name in TOGETHER:
        found = TOGETHER[name](records)
        values = [] if found is None else [found]
    else:
        values = [record[name] for record in records if type(record.get(name)) in (int, float)]
    if not values:
        have = {key for record in records for key, x in record.items() if type(x) in (int, float)}
        have |= {key for key, make in TOGETHER.items() if make(records) is not None}
        raise ConfigError(f"{folder} has no number {name!r}; expected one of {sorted(have)}")
    return values[-1]
