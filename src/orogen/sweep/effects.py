"""How the arms of a sweep differ: paired differences, confidence intervals, and the differences they can detect."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
MOST_PAIRS = 10**4


class Effect(NamedTuple):
    """An arm against the control, over the pairs that both have.

    difference: mean of arm minus control. low, high: its confidence interval at CONFIDENCE (Student's t, pairs - 1
    degrees of freedom); infinite with one pair. detectable: the smallest true difference that a test at that level
    finds with POWER, if pairs spread as these do; infinite with one pair. needed: how many pairs such a test takes to
    find the measured difference; infinite with one pair, or if more than MOST_PAIRS.
    """

    pairs: int
    difference: float
    low: float
    high: float
    detectable: float
    needed: float

    @property
    def sign(self) -> int:
        """-1 if the arm is below the control, 1 if it is above, 0 if the interval contains 0."""
        if not math.isfinite(self.low) or self.low <= 0 <= self.high:
            return 0
        return -1 if self.difference < 0 else 1

    def verdict(self, *, lower_is_better: bool) -> str:
        """better, worse, or cannot be told."""
        if self.sign == 0:
            return "cannot be told"
        return "better" if (self.sign < 0) == lower_is_better else "worse"


def paired(arm: Mapping[int, float], control: Mapping[int, float]) -> Effect | None:
    """The effect over the keys (seeds) that both have; None if they share none."""
    keys = [key for key in arm if key in control]
    if not keys:
        return None
    differences = np.array([arm[key] - control[key] for key in keys], np.float64)
    mean, pairs = float(differences.mean()), len(keys)
    if pairs == 1:
        return Effect(1, mean, -math.inf, math.inf, math.inf, math.inf)
    deviation = float(differences.std(ddof=1))
    wide, detectable = _quantiles(pairs)
    error = deviation / math.sqrt(pairs)
    needed = _pairs_needed(mean, deviation)
    return Effect(pairs, mean, mean - wide * error, mean + wide * error, detectable * error, needed)


def _quantiles(pairs: int) -> tuple[float, float]:
    """In standard errors: half the width of the confidence interval, and the smallest difference found with POWER."""
    wide, found = (float(stats.t.ppf(probability, pairs - 1)) for probability in ((1 + CONFIDENCE) / 2, POWER))
    return wide, wide + found


def _pairs_needed(difference: float, deviation: float) -> float:
    """The fewest pairs with which the difference is detectable."""
    if deviation == 0:
        return 2 if difference else math.inf
    low, high = 1, MOST_PAIRS + 1  # the detectable difference falls with the pairs: bisection
    while high - low > 1:
        middle = (low + high) // 2
        enough = _quantiles(middle)[1] * deviation / math.sqrt(middle) <= abs(difference)
        low, high = (low, middle) if enough else (middle, high)
    return high if high <= MOST_PAIRS else math.inf


def main_effects(
    values: Mapping[tuple[str, ...], Mapping[int, float]], control: Sequence[str]
) -> dict[tuple[int, str], Effect]:
    """For each axis and value of a full matrix, that value against the control's, all else equal.

    values: by the arm's values on the axes, by seed, the metric. Each seed is one pair: the mean, over the settings of
    the other axes that both have, of the value's metric minus that of the control's value.
    """
    found = {}
    for axis, usual in enumerate(control):
        for value in dict.fromkeys(arm[axis] for arm in values):
            if value == usual:
                continue
            cells: dict[int, list[float]] = {}
            for arm, by_seed in values.items():
                other = values.get((*arm[:axis], usual, *arm[axis + 1 :]), {})
                if arm[axis] == value:
                    for seed in by_seed.keys() & other.keys():
                        cells.setdefault(seed, []).append(by_seed[seed] - other[seed])
            means = {seed: float(np.mean(differences)) for seed, differences in cells.items()}
            if (effect := paired(means, dict.fromkeys(means, 0.0))) is not None:
                found[axis, value] = effect
    return found
