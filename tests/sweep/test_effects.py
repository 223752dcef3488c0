"""Effects by hand: Student's t with 2 degrees of freedom has quantiles 4.3027 (97.5 %) and 1.0607 (80 %)."""

import math

import pytest

from orogen.sweep.effects import main_effects, paired


def test_three_pairs_by_hand():
    effect = paired({0: 5.0, 1: 7.0, 2: 9.0}, {0: 4.0, 1: 5.0, 2: 6.0})  # differences 1, 2, 3
    error = 1 / math.sqrt(3)
    assert effect.pairs == 3 and effect.difference == pytest.approx(2)
    assert (effect.low, effect.high) == pytest.approx((2 - 4.30265 * error, 2 + 4.30265 * error), rel=1e-5)
    assert effect.detectable == pytest.approx((4.30265 + 1.06066) * error, rel=1e-5)
    assert effect.verdict(lower_is_better=True) == "cannot be told"
    # (t 0.975 + t 0.8) / sqrt(n), by tables: 4 pairs (3.1824 + 0.9785) / 2 = 2.08, 5 (2.7764 + 0.9410) / 2.2361 = 1.66
    assert effect.needed == 5


def test_a_difference_near_zero_takes_too_many_pairs():
    assert math.isinf(paired({0: 1.0, 1: -1.0, 2: 1e-6}, {0: 0.0, 1: 0.0, 2: 0.0}).needed)


def test_pairs_are_seeds_that_both_have():
    effect = paired({0: 1.0, 5: 9.0, 7: 3.0}, {7: 1.0, 0: 1.5, 6: 100.0})
    assert effect.pairs == 2 and effect.difference == pytest.approx((2 - 0.5) / 2)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("lower", "verdict"), [(True, "worse"), (False, "better")])
def test_an_interval_beside_zero_is_told(lower, verdict):
    effect = paired({0: 2.0, 1: 2.1, 2: 2.2}, {0: 1.0, 1: 1.1, 2: 1.21})
    assert effect.low > 0 and effect.verdict(lower_is_better=lower) == verdict


def test_one_pair_tells_nothing():
    effect = paired({3: 2.0}, {3: 1.0})
    assert effect.difference == 1 and math.isinf(effect.detectable) and math.isinf(effect.needed)
    assert effect.verdict(lower_is_better=True) == "cannot be told"


def test_main_effects_average_over_the_other_axes():
    values = {
        ("a", "x"): {0: 1.0, 1: 2.0}, ("a", "y"): {0: 3.0, 1: 4.0},
        ("b", "x"): {0: 1.5, 1: 3.0}, ("b", "y"): {0: 5.0, 1: 4.0},
    }  # fmt: skip
    found = main_effects(values, ("a", "x"))
    assert set(found) == {(0, "b"), (1, "y")}
    # b against a: seed 0 has 0.5 and 2, seed 1 has 1 and 0
    assert found[0, "b"].difference == pytest.approx((1.25 + 0.5) / 2) and found[0, "b"].pairs == 2
    # y against x: seed 0 has 2 and 3.5, seed 1 has 2 and 1
    assert found[1, "y"].difference == pytest.approx((2.75 + 1.5) / 2)
