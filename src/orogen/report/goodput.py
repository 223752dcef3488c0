"""Where the time of a run went, in seconds: the steps that it kept, and everything else."""

from collections.abc import Iterable, Mapping
from typing import Any

from orogen.report.lost import COMPILING, EVALUATING, ROLL_BACK, SAVING, STARTING, Lost

# Rows of the table after the steps: by key of the metrics, the row's label.
ASIDE = {
    STARTING: "starting: reading the corpus, restoring",
    COMPILING: "compiling the step",
    EVALUATING: "evaluating",
    SAVING: "held up by checkpoints",
}


def time_spent(records: Iterable[Mapping[str, Any]], losses: Iterable[Lost]) -> dict[str, float]:
    """Seconds by activity, the steps that were kept first. Empty if the metrics lack `start_seconds`, as those of
    earlier releases do. Time between the end of a process and the next start is unknown, and left out."""
    records, losses = list(records), list(losses)
    if not any(STARTING in record for record in records):
        return {}
    found = {"training: steps that were kept": sum(record.get("step_ms", 0.0) for record in records) / 1e3}
    found |= {text: sum(record.get(key, 0.0) for record in records) for key, text in ASIDE.items()}
    return found | {lost_row(losses): sum(loss.seconds for loss in losses)}


def goodput(spent: Mapping[str, float]) -> float | None:
    """The share of the time that was spent on steps which were kept; None if it is not known."""
    total = sum(spent.values())
    return next(iter(spent.values())) / total if total else None


def lost_row(losses: Iterable[Lost]) -> str:
    """The label of the last row: how many steps were computed in vain, and how often the run rolled back."""
    losses = list(losses)
    steps = sum(loss.until - loss.to for loss in losses)
    backs = sum(loss.cause == ROLL_BACK for loss in losses)
    return f"lost: {steps} steps computed in vain" + (f"; roll-backs: {backs}" if backs else "")
