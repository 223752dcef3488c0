"""Steps that a run computed and then lost: because it was killed, or because it rolled back after bad steps.

`lost.jsonl` has one line per loss, in the order in which they happened:

    to        the step whose checkpoint the run went on from; 0: it started over
    until     the last step that was lost
    seconds   the work lost: those steps, with the starting, compiling, evaluating and saving between them
    cause     "end" of the process; "repeat" of a bad step, to see whether it gives the same bits; "roll_back"
    position  only after a roll-back: the position of the data from which the run went on after step `to`
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.report.metrics import FILE_NAME, read_metrics

NAME = "lost.jsonl"
END, REPEAT, ROLL_BACK = "end", "repeat", "roll_back"
# Keys of a step's record: the time spent beside the step itself.
COMPILING, EVALUATING, SAVING, STARTING = SECONDS = (
    "compile_seconds", "evaluate_seconds", "save_seconds", "start_seconds",
)  # fmt: skip


class Lost(NamedTuple):
    """One line of the file."""

    to: int
    until: int
    seconds: float
    cause: str
    position: dict[str, Any] | None = None


def seconds_of(record: Mapping[str, Any]) -> float:
    """The seconds that a step took according to its record, including what was done beside it."""
    return record.get("step_ms", 0.0) / 1e3 + sum(record.get(key, 0.0) for key in SECONDS)


def read_lost(run_dir: Path) -> list[Lost]:
    """The losses so far. Raises ConfigError if a line cannot be read."""
    try:
        lines = (run_dir / NAME).read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run_dir / NAME} cannot be read ({error}); expected lines of JSON") from None
    try:
        return [Lost(**json.loads(line)) for line in lines]
    except (ValueError, TypeError, RecursionError):
        expected = f"expected one object with {', '.join(Lost._fields)} per line"
        raise ConfigError(f"{run_dir / NAME} is damaged; {expected}") from None


def add_lost(
    run_dir: Path, to: int, cause: str, position: dict[str, Any] | None = None, *, until: int = 0
) -> Lost | None:
    """Records that the steps after `to` in metrics.jsonl are lost, and those up to `until`, whose lines the disk may
    have refused; returns None if there are none.

    Call it before those lines are removed: if the process is killed between the two, the next one finds the loss
    recorded already, and does not count it twice.
    """
    records = read_metrics(run_dir) if (run_dir / FILE_NAME).is_file() else []
    gone = [record for record in records if record["step"] > to]
    last = max([record["step"] for record in gone], default=0)
    if max(last, until) <= to:
        return None
    before = read_lost(run_dir)
    loss = Lost(to, max(last, until), sum(map(seconds_of, gone)), cause, position)
    # What a process finds at its start, a roll-back may have recorded: with more steps if lines are missing.
    if cause == END and before and before[-1].to == to and before[-1].until >= last and before[-1][2] == loss.seconds:
        return before[-1]
    write_atomically(run_dir / NAME, "".join(map(_line, [*before, loss])).encode())
    return loss


def jumps(losses: Iterable[Lost]) -> dict[int, dict[str, Any]]:
    """By step, the position of the data from which the run went on after it, where that is not the next one.

    A later return to an earlier step makes a jump void: steps computed again roll back again.
    """
    found: dict[int, dict[str, Any]] = {}
    for loss in losses:
        found = {step: position for step, position in found.items() if step <= loss.to}
        if loss.position is not None:
            found[loss.to] = loss.position
    return found


def _line(loss: Lost) -> str:
    stated = {key: value for key, value in loss._asdict().items() if value is not None}
    return json.dumps(stated) + "\n"
