"""What rounding lost, as a part of a run's page: one row per operand, at the last step that was measured, with the
history of its scale."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from orogen.report.profile_page import table_html
from orogen.report.series import Records

HEADS = (
    "operand",
    "layers",
    "flushed to 0, worst",
    "of layer",
    "saturated, worst",
    "zero before",
    "log2 scale by step",
)
HISTORY = 5  # steps whose scales are shown
TEXT = (
    "Shares of an operand's numbers: those that rounding turned into 0 and those beyond the largest number of their "
    "block, in the worst layer; those that were 0 before, and the scale at up to five of the steps that were measured, "
    "the first and the last among them, in the mean over layers. Gradients that are "
    "flushed to 0 do not train: compare gradient_zeros with plain_gradient_zeros in metrics.jsonl."
)


def section(records: Records) -> str:
    """The table as a part of a page; empty if no step was measured."""
    measured = [record for record in records if record.get("rounding_flushed")]
    if not measured:
        return ""
    return (
        f"<section><h2>Rounding at step {measured[-1]['step']}</h2>{table_html([HEADS, *_rows(measured)])}"
        f"<figcaption>{html.escape(TEXT)}</figcaption></section>"
    )


def _rows(measured: Records) -> list[tuple[str, ...]]:
    found, record = [], measured[-1]
    places = sorted({round(k * (len(measured) - 1) / (HISTORY - 1)) for k in range(HISTORY)})
    for operand, flushed in record["rounding_flushed"].items():
        worst = max(flushed, key=lambda layer: flushed[layer])
        saturated = record["rounding_saturated"][operand].values()
        scales = [_scale(measured[place], operand) for place in places]
        zeros = record["rounding_zeros"][operand].values()
        found.append(
            (
                operand,
                str(len(flushed)),
                f"{flushed[worst]:.2%}",
                worst,
                f"{max(saturated):.2%}",
                f"{_mean(list(zeros)):.2%}",
                ", ".join(scales),
            )
        )
    return found


def _scale(record: Mapping[str, Any], operand: str) -> str:
    """The mean over layers of log2 of the operand's scale; a dash if it was not measured, since a recipe may change, or
    if it is 0 in every layer."""
    layers = record["rounding_log2_scale"].get(operand, {}).values()
    known = [scale for scale in layers if scale is not None]
    return f"{_mean(known):.1f}" if known else "–"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
