"""The objective of language models: the next token of packed text, and those after it that an MTP block predicts.

Letters: b batch, t time, d model.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from orogen.config.model import ModelConfig
from orogen.data.packing import NEXT, NEXT_WEIGHT, Batch
from orogen.model.heads import token_nats
from orogen.model.lm import LanguageModel
from orogen.model.mtp import shifted_segments
from orogen.parallel.context import later
from orogen.parallel.plan import Plan
from orogen.train.task import ByName, Objective

# Names of the metrics: nats of the next token, and of each token after it.
LOSS, MTP_LOSS = "loss", "mtp_loss"


def targets(batch: Batch, depth: int, plan: Plan) -> Array:
    """The token (b, t) that position t predicts at this depth: token t + 1 + depth, from NEXT if the batch has it."""
    return batch.extras[NEXT] if depth == 0 and NEXT in batch.extras else later(batch.tokens_bt, depth + 1, plan)


def target_weights(batch: Batch, depth: int, plan: Plan) -> Array:
    """Weight (b, t) of predicting token t + 1 + depth from position t: that token's own, or 0 in another document."""
    if depth == 0 and NEXT in batch.extras:
        return batch.extras[NEXT_WEIGHT]
    inside_bt = shifted_segments(batch.segments_bt, depth + 1, plan) != 0
    return jnp.where(inside_bt, later(batch.weights_bt, depth + 1, plan), 0)


def _counts(batch: Batch, depths: int, plan: Plan) -> ByName:
    """Weighted targets by name. A negative weight, of a token to unlearn, counts as much as a positive one."""
    return _by_name([jnp.abs(target_weights(batch, depth, plan)).sum() for depth in range(depths + 1)])


def _sums(model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
    """Weighted nats by name."""
    return _by_name(
        [
            token_nats(h_btd, model, targets(batch, depth, plan), target_weights(batch, depth, plan), plan)
            for depth, h_btd in enumerate(hidden)
        ]
    )


def _by_name(by_depth: list[Array]) -> ByName:
    named = {LOSS: by_depth[0]}
    return named | {MTP_LOSS: jnp.stack(by_depth[1:])} if by_depth[1:] else named


def _shares(config: ModelConfig, depths: int) -> Mapping[str, float]:
    """1, and `mtp_loss_scale` for the mean of the deeper predictions. Source: arXiv:2412.19437, eq. 24-25."""
    return {LOSS: 1.0} | ({MTP_LOSS: config.mtp_loss_scale / depths} if depths else {})


NEXT_TOKENS = Objective(counts=_counts, sums=_sums, shares=_shares)
# For evaluation, without the MTP block.
NEXT_TOKEN = dataclasses.replace(NEXT_TOKENS, deeper=False)
