"""Where the time of a run went, in seconds: the steps that it kept, and everything else."""

from collections.abc import Iterable, Mapping
from typing import Any

from orogen.report.lost import ROLL_BACK, Lost

# Rows of the table after the steps: a key of the metrics, and what a reader is told.
ASIDE = {
    "start_seconds": "starting: reading the corpus, restoring",
    "compile_seconds": "compiling the step",
    "evaluate_seconds": "evaluating",
    "save_seconds": "held up by checkpoints",
}


def time_spent(records: Iterable[Mapping[str, Any]], losses: Iterable[Lost]) -> dict[str, float]:
    """Seconds by what they were spent on, the kept steps first. Empty if the metrics do not say how the run started, as
    those of earlier releases do not. Time between the end of a process and the next start is not known."""
    records, losses = list(records), list(losses)
    if not any("start_seconds" in record for record in records):
        return {}
    found = {"training: steps that were kept": sum(record.get("step_ms", 0.0) for record in records) / 1e3}
    found |= {text: sum(record.get(key, 0.0) for record in records) for key, text in ASIDE.items()}
    return found | {lost_row(losses): sum(loss.seconds for loss in losses)}


def goodput(spent: Mapping[str, float]) -> float | None:
    """The share of the time in which steps were computed that were kept; None if that is not known."""
    total = sum(spent.values())
    return next(iter(spent.values())) / total if total else None


def lost_row(losses: Iterable[Lost]) -> str:
    """What the last row of the table says: how many steps were computed in vain, and how often the run rolled back."""
    losses = list(losses)
    steps = sum(loss.until - loss.to for loss in losses)
    backs = sum(loss.cause == ROLL_BACK for loss in losses)
    return f"lost: {steps} steps computed in vain" + (f"; roll-backs: {backs}" if backs else "")
