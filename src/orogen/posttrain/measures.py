"""What a rollout says for the record of its step."""

import collections
import math
from collections.abc import Sequence

import numpy as np

from orogen.config.rl import RLConfig
from orogen.posttrain.environments.interface import MOST_PARTS
from orogen.posttrain.samples import Mismatch, Sample


def measured(
    samples: Sequence[Sample], groups: Sequence[Sequence[Sample]], mismatch: Mismatch, rl: RLConfig
) -> dict[str, float]:  # fmt: skip
    """Means over samples, and `NAME/ENVIRONMENT` over those of each environment. A reward is a mean over the samples
    that have one; without any, it is left out. reward_parts_left_out: parts of all samples' rewards that are no metric,
    if there are any.

    teacher_divergence: the mean of log π - log π_teacher over tokens that a teacher judges, at temperature 1 an
    estimate of KL(π || π_teacher) per token. zero_gradient_groups: share of the groups without an advantage. mismatch:
    of the trainer's log-probabilities from the rollout's, over tokens; masked_tokens: share whose weight is 0;
    left_out_sequences: share of sequences with too large an error.
    """
    found = _of(samples, "")
    for one in rl.environments:
        found |= _of([sample for sample in samples if sample.environment == one.name], f"/{one.name}")
    equal = [is_flat(group) for group in groups]
    return found | {
        "zero_gradient_groups": float(np.mean(equal)),
        "mismatch_mean": mismatch.total / max(mismatch.tokens, 1),
        "mismatch_max": mismatch.largest,
        "masked_tokens": mismatch.masked / max(mismatch.tokens, 1),
        "left_out_sequences": mismatch.left_out / max(mismatch.sequences, 1),
    }


def aged(samples: Sequence[Sample], number: int) -> dict[str, float]:
    """How many batches of rollouts old the weights were that chose tokens, when batch `number` trains: staleness_mean,
    staleness_max; mixed_answers: share of sequences whose tokens are of several weights."""
    of_each = [
        [number - version for version, mine in zip(track.versions, track.chosen, strict=True) if mine]
        for sample in samples for track in sample.tracks
    ]  # fmt: skip
    ages = [age for one in of_each for age in one]
    mixed = float(np.mean([len(set(one)) > 1 for one in of_each]))
    return {"staleness_mean": float(np.mean(ages)), "staleness_max": float(max(ages)), "mixed_answers": mixed}


def is_flat(group: Sequence[Sample]) -> bool:
    """Whether a judged group has no gradient: its rewards, with what is added for lengths, are equal."""
    return all(sample.advantage == 0 for sample in group)


def _parts(samples: Sequence[Sample], suffix: str) -> dict[str, float]:
    """Means of the parts of rewards. A server may name those of every reward anew: of more than MOST_PARTS, those of
    the most samples."""
    counts = collections.Counter(name for sample in samples for name in sample.rewards)
    kept = dict(counts.most_common(MOST_PARTS))
    found = {}
    for name in sorted(kept):
        known = [sample.rewards[name] for sample in samples if name in sample.rewards]
        found[f"reward{suffix}/{name}"] = float(np.mean(known))
    left_out = counts.total() - sum(kept.values()) + sum(sample.left_out for sample in samples)
    return found | ({f"reward_parts_left_out{suffix}": float(left_out)} if left_out else {})


def _of(samples: Sequence[Sample], suffix: str) -> dict[str, float]:
    if not samples:
        return {}
    rewards = [sample.reward for sample in samples if not math.isnan(sample.reward)]
    found = {f"reward{suffix}": float(np.mean(rewards))} if rewards else {}
    if suffix:
        found |= _parts(samples, suffix)
    chosen = [sum(track.chosen) and sum(track.rollout) for sample in samples for track in sample.tracks]
    tokens = sum(sample.tokens for sample in samples)
    judged = [sample for sample in samples if sample.divergence is not None]
    if judged:
        total = math.fsum(sample.divergence or 0.0 for sample in judged)
        found[f"teacher_divergence{suffix}"] = total / max(sum(sample.tokens for sample in judged), 1)
    return found | {
        f"answer_tokens{suffix}": tokens / len(samples),
        f"overlong{suffix}": float(np.mean([sample.overlong for sample in samples])),
        f"failed_verifications{suffix}": float(sum(sample.fault is not None for sample in samples)),
        # Of what was drawn, an unbiased estimate at temperature 1.
        f"rollout_entropy{suffix}": -float(sum(chosen)) / max(tokens, 1),
    }
