"""Advantages, bonuses and corrections against numbers worked by hand."""

import dataclasses

import numpy as np
import pytest

from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.posttrain.advantages import advantages, all_equal, corrected, length_bonus, overlong_penalty

NAN = float("nan")
ONE = EnvironmentConfig(name="a", kind="synthetic", family="copy")
RL = RLConfig(environments=(ONE,), prompts=2, samples=2, max_tokens=4, template="plain")


def test_leave_one_out_by_hand():
    """Of 1, 0, 0, 3: the others of the first have mean 1 and variance (1 + 1 + 4) / 2 = 3."""
    found = advantages(np.array([1.0, 0.0, 0.0, 3.0]), baseline="leave_one_out", normalise=False)
    np.testing.assert_allclose(found, [0, -4 / 3, -4 / 3, 3 - 1 / 3], rtol=1e-12)
    found = advantages(np.array([1.0, 0.0, 0.0, 3.0]), baseline="leave_one_out", normalise=True)
    # Of 1, 0, 3: mean 4/3, variance (1/9 + 16/9 + 25/9) / 2 = 7/3; of 1, 0, 0: mean 1/3, variance 1/3.
    expected = [0, -4 / 3 / (7 / 3) ** 0.5, -4 / 3 / (7 / 3) ** 0.5, 8 / 3 / (1 / 3) ** 0.5]
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def test_a_group_s_own_mean_by_hand():
    """Of 2, 0, 1: mean 1, variance 1 with n - 1."""
    found = advantages(np.array([2.0, 0.0, 1.0]), baseline="group", normalise=True, clip=0.5)
    np.testing.assert_allclose(found, [0.5, -0.5, 0], atol=1e-12)
    np.testing.assert_allclose(
        advantages(np.array([2.0, 0.0, 1.0]), baseline="group", normalise=True), [1, -1, 0], atol=2e-6
    )


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_samples_without_a_reward_are_in_no_baseline(baseline):
    reward = np.array([1.0, NAN, 0.0, NAN, 0.25])
    found = advantages(reward, baseline=baseline, normalise=True)
    alone = advantages(reward[[0, 2, 4]], baseline=baseline, normalise=True)
    assert found[1] == found[3] == 0 and found[[0, 2, 4]].tolist() == alone.tolist()


@pytest.mark.parametrize("reward", [[0.1] * 7, [NAN, 0.3], [NAN, NAN], [1 / 3, NAN, 1 / 3]])
def test_equal_rewards_have_exactly_no_advantage(reward):
    for baseline in ("group", "leave_one_out"):
        assert not advantages(np.array(reward), baseline=baseline, normalise=True).any()
    assert all_equal(np.array(reward)) and not all_equal(np.array([0.0, 1.0, NAN]))


def test_one_that_differs_from_equal_others_is_not_divided_by_nothing():
    found = advantages(np.array([1.0, 0.1, 0.1, 0.1]), baseline="leave_one_out", normalise=True)
    assert found[0] == pytest.approx(0.9) and np.all(found[1:] < 0)


def test_length_control_by_hand():
    """Thoughts of 10, 20, 30: shares 1, 1/2, 0, centred 1/2, 0, -1/2. Contents of 5, 5, 5: none. The bound is the
    reward of number max(0, floor(3 · 0.8) - 1) = 1 in order: 0.5."""
    sizes = [np.array([10, 20, 30]), np.array([5, 5, 5])]
    found = length_bonus(np.array([0.5, 1.0, 0.0]), sizes, weight=0.5, concise=0.25)
    np.testing.assert_allclose(found, [0.25 + 0.25, 0, -0.25], rtol=1e-12)
    found = length_bonus(np.array([0.4, 1.0, 0.5]), sizes, weight=0.5, concise=0.25)
    np.testing.assert_allclose(found, [0.25, 0, -0.25], rtol=1e-12)  # the shortest is not good enough
    found = length_bonus(np.array([0.5, NAN, 0.0]), sizes, weight=1.0, concise=0.0)
    np.testing.assert_allclose(found, [0.5, 0, -0.5], rtol=1e-12)


def test_the_overlong_penalty_by_hand():
    settings = {"most": 100, "buffer": 20, "penalty": 0.5}
    assert [overlong_penalty(n, **settings) for n in (1, 80, 90, 100, 101, 900)] == [0, 0, -0.25, -0.5, -0.5, -0.5]


TRAINER = np.log([0.5, 0.2, 0.9, 0.3])
ROLLOUT = np.log([0.5, 0.4, 0.3, 0.29])  # ratios 1, 1/2, 3, 1.034


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ("none", [1, 1, 1, 1]),
        ("tis", [1, 0.6, 2, 30 / 29]),
        ("icepop", [1, 0, 0, 30 / 29]),
        ("sequence", [1, 0.5, 3, 30 / 29]),  # the geometric mean, (1.552)^(1/4) = 1.116, is inside
    ],
)
def test_corrections_by_hand(importance, expected):
    rl = dataclasses.replace(RL, importance=importance, importance_low=0.6, importance_high=2.0, sequence_error=None)
    found = corrected(TRAINER, ROLLOUT, rl)
    np.testing.assert_allclose(found.weight_t, expected, rtol=1e-12)
    assert (
        found.kept
        and found.largest == pytest.approx(np.log(3))
        and found.total == pytest.approx(np.log(2) + np.log(3) + np.log(30 / 29))
    )


def test_truncated_importance_sampling_has_no_lower_bound_unless_one_is_set():
    """As in NeMo RL; ratios 1, 1/2, 3, 1.034. IcePop's bound stays 0.5."""
    small, high = TRAINER - np.array([0, 1, 0, 0]), {"importance_high": 5.0, "sequence_error": None}
    found = corrected(small, ROLLOUT, dataclasses.replace(RL, importance="tis", **high))
    np.testing.assert_allclose(found.weight_t, [1, 0.5 / np.e, 3, 30 / 29], rtol=1e-12)
    found = corrected(small, ROLLOUT, dataclasses.replace(RL, importance="icepop", **high))
    np.testing.assert_allclose(found.weight_t, [1, 0, 3, 30 / 29], rtol=1e-12)


def test_a_sequence_outside_is_masked_as_a_whole():
    rl = dataclasses.replace(RL, importance="sequence", importance_low=0.6, importance_high=1.1)
    assert not corrected(TRAINER, ROLLOUT, rl).weight_t.any()


def test_a_sequence_with_a_large_error_is_left_out():
    """The mean of 1, 2, 3 and 30/29 is 1.7586."""
    assert corrected(TRAINER, ROLLOUT, dataclasses.replace(RL, sequence_error=1.76)).kept
    assert not corrected(TRAINER, ROLLOUT, dataclasses.replace(RL, sequence_error=1.75)).kept


def test_a_ratio_that_is_no_number_weighs_nothing():
    found = corrected(np.array([NAN, 800.0, -1.0]), np.array([-1.0, -1.0, -1.0]), RL)
    assert found.weight_t.tolist() == [0, 0, 1] and not found.kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "RLConfig.samples is 1; expected at least 2"),
        ({"environments": ()}, "expected at least one, each once"),
        ({"environments": (ONE, ONE)}, "expected at least one, each once"),
        ({"updates": 3}, "RLConfig.updates is 3; expected a divisor of prompts = 2"),
        ({"algorithm": "ppo"}, "RLConfig.algorithm is 'ppo'; expected one of grpo, dapo, gspo"),
        ({"algorithm": "dapo"}, "RLConfig.overlong_buffer is 0; expected above 0 where overlong is penalty"),
        ({"importance_low": 3.0}, "RLConfig.importance_low is 3.0; expected below importance_high = 2.0"),
        ({"dual_clip": 1.0}, "RLConfig.dual_clip is 1.0; expected above 1"),
        ({"sequence_error": 0.5}, "RLConfig.sequence_error is 0.5; expected 1 or more, or None"),
        ({"kl": float("nan")}, "RLConfig.kl is nan; expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "chess"}, "EnvironmentConfig.kind is 'chess'; expected one of"),
        ({"family": None}, "EnvironmentConfig.family is None; expected a name with kind 'synthetic'"),
        ({"corpus": "a.jsonl"}, "EnvironmentConfig.corpus is 'a.jsonl'; expected None"),
        ({"name": "a b"}, "EnvironmentConfig.name is 'a b'; expected letters, digits"),
        ({"unsandboxed": True}, "EnvironmentConfig.unsandboxed is True; expected False"),
        ({"share": 0.0}, "EnvironmentConfig.share is 0.0; expected a number above 0"),
        ({"kind": "reasoning_gym", "level": 2}, "EnvironmentConfig.level is 2; expected 1: only generated tasks"),
        ({"kind": "code", "family": None, "corpus": "a.jsonl", "level": 2}, "EnvironmentConfig.level is 2; expected 1"),
        ({"kind": "code", "family": None, "corpus": "a.jsonl", "examples": 9}, "examples is 9; expected 1000"),
    ],
)
def test_environments_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ONE, **change)


def test_an_algorithm_sets_what_is_left_open():
    dapo = dataclasses.replace(RL, algorithm="dapo", overlong_buffer=2)
    assert (dapo.chosen("mean"), dapo.chosen("resample"), dapo.chosen("overlong")) == ("token", 3, "penalty")
    gspo = dataclasses.replace(RL, algorithm="gspo", clip_low=0.1)
    assert (gspo.chosen("mean"), gspo.chosen("clip_low"), gspo.chosen("clip_high")) == ("sequence", 0.1, 4e-4)
