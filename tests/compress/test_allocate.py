"""The choice of formats against all choices, and what it does with budgets and scores at the edge."""

import itertools
import math

import numpy as np
import pytest

from orogen.compress.allocate import Unit, allocate, summary
from orogen.config.checks import ConfigError


def units(seed, count=6):
    """Scores over many orders of magnitude, as layers of a model have them."""
    random = np.random.default_rng(seed)
    found = []
    for layer in range(count):
        size = int(random.integers(1, 50))
        scores = {"nvfp4": 10 ** random.uniform(-6, 3), "fp8": 10 ** random.uniform(-8, 0), "plain": 0.0}
        found.append(Unit(layer, "dense_up", size, float(size), scores))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_other_choice_within_the_budget_is_better(seed):
    given, budget = units(seed), np.random.default_rng(seed).uniform(4.1, 12)
    every = [summary(given, names) for names in itertools.product(*(unit.scores for unit in given))]
    best = min((one for one in every if one.effective_bits <= budget + 1e-9), key=lambda one: one.score)
    found = allocate(given, budget)
    assert found.effective_bits <= budget * (1 + 1e-6)
    assert found.score == pytest.approx(best.score, rel=1e-9)


def test_bits_are_of_counted_weights():
    """A routed expert's weights may count by a quarter: 4 · 60 / 4 + 16 · 10 over 25."""
    given = [Unit(0, "routed", 60, 15.0, {"nvfp4": 1.0}), Unit(1, "dense_up", 10, 10.0, {"fp8": 2.0, "plain": 0.0})]
    found = allocate(given, 8.8)
    assert found.formats == ["nvfp4", "plain"] and found.effective_bits == pytest.approx((4 * 15 + 16 * 10) / 25)
    assert allocate(given, 8.7).formats == ["nvfp4", "fp8"]


def test_a_sensitive_layer_stays_high():
    given = [Unit(n, "dense_up", 10, 10.0, {"nvfp4": 1.0, "fp8": 0.1, "plain": 0.0}) for n in range(4)]
    given[2] = given[2]._replace(scores={"nvfp4": 900.0, "fp8": 80.0, "plain": 0.0})
    assert allocate(given, 7.0).formats == ["nvfp4", "nvfp4", "plain", "nvfp4"]


def test_a_score_that_is_not_finite_counts_as_more_than_all_others():
    given = [Unit(n, "dense_up", 10, 10.0, {"nvfp4": 5.0, "plain": 0.0}) for n in range(3)]
    given[1] = given[1]._replace(scores={"nvfp4": math.inf, "plain": 0.0})
    assert allocate(given, 8.0).formats == ["nvfp4", "plain", "nvfp4"]


def test_the_smallest_formats_are_the_least_budget():
    given = units(0, 2)
    assert allocate(given, 4.0).formats == ["nvfp4", "nvfp4"]
    with pytest.raises(ConfigError, match="QuantizeConfig.effective_bits is 3.9; expected at least 4, which"):
        allocate(given, 3.9)
