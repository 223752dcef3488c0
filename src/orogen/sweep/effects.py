"""How the arms of a sweep differ: paired differences with confidence intervals, and what could have been seen."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8


class Effect(NamedTuple):
    """An arm against the control, over the pairs that both have.

    difference: mean of arm minus control. low, high: its confidence interval at CONFIDENCE (Student's t, pairs - 1
    degrees of freedom); infinite with one pair. detectable: the smallest true difference that a test at that level
    finds with POWER, if pairs spread as these do; infinite with one pair.
    """

    pairs: int
    difference: float
    low: float
    high: float
    detectable: float

    def verdict(self, *, lower_is_better: bool) -> str:
        """better, worse, or cannot be told."""
        if not math.isfinite(self.low) or self.low <= 0 <= self.high:
            return "cannot be told"
        return "better" if (self.difference < 0) == lower_is_better else "worse"


def paired(arm: Mapping[int, float], control: Mapping[int, float]) -> Effect | None:
    """The effect over the keys (seeds) that both have; None if they share none."""
    keys = [key for key in arm if key in control]
    if not keys:
        return None
    differences = np.array([arm[key] - control[key] for key in keys], np.float64)
    mean, pairs = float(differences.mean()), len(keys)
    if pairs == 1:
        return Effect(1, mean, -math.inf, math.inf, math.inf)
    error = float(differences.std(ddof=1)) / math.sqrt(pairs)
    wide = float(stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1))
    found = float(stats.t.ppf(POWER, pairs - 1))
    return Effect(pairs, mean, mean - wide * error, mean + wide * error, (wide + found) * error)


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
