"""The series that a run's pictures and headline show, computed from the records of its metrics.

Letters: n records, e experts, c spans of steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Records = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]


def column(records: Records, key: str) -> Floats:
    """One value per record, NaN where it is missing."""
    return np.array([np.nan if r.get(key) is None else r[key] for r in records], np.float64)


def tokens_seen(records: Records) -> Floats:
    """Tokens trained on up to and including each record."""
    return np.cumsum(column(records, "tokens"))


def running_mean(values_n: Floats) -> Floats:
    """Centred mean of the finite values over a fiftieth of the records; the window is shorter at both ends."""
    if not len(values_n):
        return values_n
    finite_n = np.isfinite(values_n)
    ones = np.ones(max(1, len(values_n) // 50))
    sums_n = np.convolve(np.where(finite_n, values_n, 0.0), ones, "same")
    counts_n = np.convolve(finite_n, ones, "same").round()
    return np.divide(sums_n, counts_n, out=np.full(len(values_n), np.nan), where=counts_n > 0)


def bits_per_nat(records: Records) -> float | None:
    """Held-out bits per byte over held-out nats per token: converts a loss per token into bits per byte."""
    scored = [r for r in records if r.get("heldout_loss") and r.get("heldout_bits_per_byte") is not None]
    ratio_n = column(scored, "heldout_bits_per_byte") / column(scored, "heldout_loss")
    return float(np.nanmedian(ratio_n)) if np.isfinite(ratio_n).any() else None


def dropped_share(records: Records) -> tuple[Floats, Floats]:
    """The steps that recorded loads and drops, and the share of their assignments that was dropped."""
    counted = [r for r in records if r.get("expert_load") and r.get("dropped_tokens") is not None]
    routed_n = np.array([sum(map(sum, r["expert_load"])) for r in counted], np.float64)
    dropped_n = np.array([np.sum(r["dropped_tokens"]) for r in counted], np.float64)
    return column(counted, "step"), dropped_n / np.maximum(routed_n, 1)


def load_over_even(records: Records, layer: int, edges_c: Floats) -> Floats:
    """(e, c): each expert's load in each span of steps, over an even share; NaN in spans without a record.

    Span c holds the steps edges_c[c] ≤ step < edges_c[c+1]; every record must lie in one.
    """
    load_ne = np.array([r["expert_load"][layer] for r in records], np.float64)
    column_n = np.searchsorted(edges_c, column(records, "step"), side="right") - 1
    load_ce = np.zeros((len(edges_c) - 1, load_ne.shape[1]))
    np.add.at(load_ce, column_n, load_ne)
    even_c = load_ce.mean(axis=1)[:, None]
    return np.divide(load_ce, even_c, out=np.full_like(load_ce, np.nan), where=even_c > 0).T


def load_violation(records: Records) -> float | None:
    """Mean over the MoE layers, and the last tenth of the records that have loads, of max / mean - 1 of the experts'
    loads; None without loads. Source: MaxVio of arXiv:2408.15664, per batch."""
    loads_n = [r["expert_load"] for r in records if r.get("expert_load")]
    last_nle = np.array(loads_n[-max(1, len(loads_n) // 10) :], np.float64)
    return float((last_nle.max(-1) / last_nle.mean(-1)).mean() - 1) if loads_n else None


def short_number(value: float, _: object = None) -> str:
    """1234567 as 1.23M; the second argument is a tick's position, which matplotlib passes."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
