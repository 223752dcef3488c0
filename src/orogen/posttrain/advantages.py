"""Rewards of a group to advantages, and mismatches to weights, on the host in float64.

Letters: n samples of a group, t tokens of a sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orogen.config.rl import RLConfig

EPSILON = 1e-6  # beside a standard deviation, as in NeMo RL
CONCISE_QUANTILE = (
    0.8  # of base rewards, from which on a short answer is rewarded (Nemotron 3 Nano report, section 3.4)
)


def advantages(reward_n: np.ndarray, *, baseline: str, normalise: bool, clip: float | None = None) -> np.ndarray:
    """The advantage (n,) of each sample; 0 where the reward is NaN: that sample is in no baseline either.

    baseline: group, the mean of all; or leave_one_out, the mean of the others. normalise divides by the standard
    deviation (n - 1 in its denominator) of the same samples plus EPSILON, where it is above 0. Equal rewards have
    advantages of exactly 0. Source: arXiv:2402.03300, section 4.1.2; NeMo RL, calculate_baseline_and_std_per_prompt.
    """
    found_n = np.zeros(len(reward_n))
    there_n = ~np.isnan(reward_n)
    known = np.asarray(reward_n, np.float64)[there_n]
    if all_equal(known):
        return found_n
    if baseline == "group":
        mean, deviation = np.full(len(known), known.mean()), np.full(len(known), known.std(ddof=1))
    else:
        others = [np.delete(known, place) for place in range(len(known))]
        mean = np.array([one.mean() for one in others])
        # Equal ones have none, whatever rounding says.
        spread = lambda one: 0.0 if len(one) < 2 or np.all(one == one[0]) else one.std(ddof=1)  # noqa: E731
        deviation = np.array([spread(one) for one in others])
    value = known - mean
    if normalise:
        value = np.where(deviation > 0, value / (deviation + EPSILON), value)
    found_n[there_n] = value if clip is None else np.clip(value, -clip, clip)
    return found_n


def taught(teacher_t: np.ndarray, trainer_t: np.ndarray, *, clip: float | None = None) -> np.ndarray:
    """The advantage (t,) of each token that a teacher judges: log π_teacher - log π, whose mean over tokens that the
    policy drew is an estimate of -KL(π || π_teacher). Source: the report of Nemotron 3 Ultra (MOPD); NeMo RL, opd.py.
    """
    value_t = teacher_t.astype(np.float64) - trainer_t.astype(np.float64)
    return value_t if clip is None else np.clip(value_t, -clip, clip)


def all_equal(reward_n: np.ndarray) -> bool:
    """Whether a group has no gradient: fewer than two rewards are known, or all are equal."""
    known = reward_n[~np.isnan(reward_n)]
    return len(known) < 2 or bool(np.all(known == known[0]))


def length_bonus(
    reward_n: np.ndarray, lengths: Sequence[np.ndarray], *, weight: float, concise: float
) -> np.ndarray:  # fmt: skip
    """What is added to rewards (n,) for short texts. lengths: of each part of an answer, thought and content, (n,).

        weight · Σ_part centred(1 - (ℓ - ℓ_min) / (ℓ_max - ℓ_min)) + concise · [shortest part, good]

    A part of equal lengths has no bonus of the first kind. A sample is good if its reward reaches that of number
    max(0, ⌊n · 0.8⌋ - 1) in ascending order. Source: Nemotron 3 Nano report, section 3.4.
    """
    bonus_n = np.zeros(len(reward_n))
    there_n = ~np.isnan(reward_n)
    if not there_n.any():
        return bonus_n
    ranked = np.sort(reward_n[there_n])
    bound = ranked[max(0, int(len(ranked) * CONCISE_QUANTILE) - 1)]
    for length_n in lengths:
        known = np.asarray(length_n, np.float64)[there_n]
        short, span = known.min(), known.max() - known.min()
        share = 1 - (known - short) / span if span > 0 else np.zeros(len(known))
        part = weight * (share - share.mean())
        if span > 0 or len(known) == 1:
            part = part + concise * ((known == short) & (reward_n[there_n] >= bound))
        bonus_n[there_n] += part
    return bonus_n


def overlong_penalty(length: int, *, most: int, buffer: int, penalty: float) -> float:
    """From 0 at most - buffer tokens to -penalty at `most` and beyond. Source: arXiv:2503.14476, eq. 13."""
    return max(-penalty, min(0.0, -(length - (most - buffer)) / buffer * penalty))


class Corrected(NamedTuple):
    """What rollouts that differ from the trainer come to: the weight (t,) of each token, whether the sequence is kept,
    and the largest and the summed |log π_trainer - log π_rollout| of its tokens."""

    weight_t: np.ndarray
    kept: bool
    largest: float
    total: float


def corrected(trainer_t: np.ndarray, rollout_t: np.ndarray, rl: RLConfig) -> Corrected:
    """Of a sequence's chosen tokens, by their log-probabilities. A weight that is no finite number is 0.

    Sources: TIS, https://fengyao.notion.site/off-policy-rl; IcePop, https://ringtech.notion.site/icepop; the error of a
    sequence, NeMo RL, seq_logprob_error_threshold.
    """
    gap_t = trainer_t.astype(np.float64) - rollout_t.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        ratio_t, error_t = np.exp(gap_t), np.exp(np.abs(gap_t))
        whole = float(np.exp(gap_t.mean())) if len(gap_t) else 1.0
    inside_t = (ratio_t >= rl.least_importance) & (ratio_t <= rl.importance_high)
    weight_t = {
        "none": lambda: np.ones(len(gap_t)),
        "tis": lambda: np.clip(ratio_t, rl.least_importance, rl.importance_high),
        "icepop": lambda: np.where(inside_t, ratio_t, 0),
        "sequence": lambda: ratio_t * (rl.least_importance <= whole <= rl.importance_high),
    }[rl.importance]()
    weight_t = np.where(np.isfinite(ratio_t), weight_t, 0) if rl.importance != "none" else weight_t
    kept = rl.sequence_error is None or bool(len(gap_t) == 0 or error_t.mean() <= rl.sequence_error)
    size_t = np.abs(gap_t)
    return Corrected(weight_t, kept, float(size_t.max(initial=0)), float(size_t.sum()))
