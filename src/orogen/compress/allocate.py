"""AutoQuantize's choice: one format per unit, of least total sensitivity under a budget of bits.

    minimise Σ_u Σ_f score[u, f] z[u, f]   subject to   Σ_f z[u, f] = 1,   Σ_u Σ_f bits[f] weight[u] z[u, f] ≤ budget

with z in {0, 1}, by SciPy's mixed-integer solver (HiGHS). ModelOpt solves the same programme, there with PuLP.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from orogen.config.checks import ConfigError
from orogen.config.quantize import BITS, PLAIN


class Unit(NamedTuple):
    """Weights whose format is chosen together. size: their number; counted: that number as the budget counts it;
    scores: the sensitivity to each format that the unit may have."""

    layer: int
    name: str
    size: int
    counted: float
    scores: dict[str, float]


class Allocation(NamedTuple):
    """The format of each unit, the mean bits per counted weight, and the sum of scores."""

    formats: list[str]
    effective_bits: float
    score: float


def allocate(units: Sequence[Unit], effective_bits: float, field: str = "QuantizeConfig.effective_bits") -> Allocation:
    """The best choice with at most `effective_bits` bits per counted weight.

    A score counts as 0 for the compute dtype, and where it is not finite as more than all others together. Raises
    ConfigError if the budget is below what the smallest formats need.
    """
    require_budget(units, effective_bits, field)
    counted = sum(unit.counted for unit in units)
    scores = _finite(units)
    best = [list(unit.scores) for unit in units]
    while True:
        allowed = best
        formats = _solved(units, scores, allowed, effective_bits * counted)
        total = sum(each[name] for each, name in zip(scores, formats, strict=True))
        # The solver's tolerances are relative to the largest score, and scores differ by orders of magnitude. No better
        # choice has one above this total: without those the rest is solved to a finer tolerance.
        best = [[n for n in names if each[n] <= total] for each, names in zip(scores, allowed, strict=True)]
        if best == allowed or total == 0:
            return summary(units, formats)


def require_budget(units: Sequence[Unit], effective_bits: float, field: str = "QuantizeConfig.effective_bits") -> None:
    """Raises ConfigError if the budget is below what the smallest formats need."""
    counted = sum(unit.counted for unit in units)
    least = sum(min(BITS[name] for name in unit.scores) * unit.counted for unit in units) / counted
    if effective_bits < least - 1e-9:
        raise ConfigError(
            f"{field} is {effective_bits:g}; expected at least {least:.4g}, which the smallest formats that the layers "
            "may have take"
        )


def _solved(
    units: Sequence[Unit], scores: Sequence[dict[str, float]], allowed: Sequence[list[str]], budget: float
) -> list[str]:
    """The best of each unit's allowed formats. budget: in bits."""
    flat = np.array([each[name] for each, names in zip(scores, allowed, strict=True) for name in names])
    costs = np.array([BITS[name] * unit.counted for unit, names in zip(units, allowed, strict=True) for name in names])
    one_each = block_diag([np.ones((1, len(names))) for names in allowed], format="csr")
    limit = LinearConstraint(csr_array(costs[None] / budget), -np.inf, 1.0)
    found = milp(
        flat / max(flat.max(), np.finfo(float).tiny), integrality=np.ones(len(flat)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), limit], options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        raise RuntimeError(f"the solver found no choice: {found.message}")
    formats, start = [], 0
    for names in allowed:
        formats.append(names[int(np.argmax(found.x[start : start + len(names)]))])
        start += len(names)
    return formats


def summary(units: Sequence[Unit], formats: Sequence[str]) -> Allocation:
    """The bits and the score of a choice."""
    counted = sum(unit.counted for unit in units)
    bits = sum(BITS[name] * unit.counted for unit, name in zip(units, formats, strict=True)) / counted
    score = sum(
        0.0 if name == PLAIN else unit.scores.get(name, math.nan) for unit, name in zip(units, formats, strict=True)
    )
    return Allocation(list(formats), bits, score)


def _finite(units: Sequence[Unit]) -> list[dict[str, float]]:
    raw = [{name: 0.0 if name == PLAIN else float(s) for name, s in unit.scores.items()} for unit in units]
    beyond = 2 * sum(s for each in raw for s in each.values() if math.isfinite(s)) + 1
    return [{name: s if math.isfinite(s) else beyond for name, s in each.items()} for each in raw]
