"""Losses and log-likelihoods from final hidden states, without holding the logits of a whole batch.

Letters: b batch, t time, d model, v vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.kernels import cross_entropy, divergence
from orogen.kernels.cross_entropy.operands import Reduce
from orogen.layers import embedding
from orogen.model.lm import LanguageModel
from orogen.parallel.plan import Plan


def token_nats(h_btd: Array, model: LanguageModel, targets_bt: Array, weights_bt: Array, plan: Plan) -> Array:
    """The scalar sum of weight times nats over the targets (b, t), for this device's rows and context rank.

    h_btd: final-normed hidden states, laid out as the residual stream. A weight may be negative, or 0 where there
    is no target.
    """
    with jax.named_scope("cross_entropy"):
        operands, settings = _read(h_btd, model, plan)
        return cross_entropy.cross_entropy(*operands, targets_bt.reshape(-1), weights_bt.reshape(-1), **settings)


def log_likelihoods(h_btd: Array, model: LanguageModel, targets_bt: Array, plan: Plan) -> Array:
    """The log-likelihood (b, t) float32 of each target, for this device's rows and context rank; see `token_nats`."""
    with jax.named_scope("cross_entropy"):
        operands, settings = _read(h_btd, model, plan)
        return cross_entropy.log_likelihoods(*operands, targets_bt.reshape(-1), **settings).reshape(targets_bt.shape)


def scores(h_btd: Array, model: LanguageModel, plan: Plan) -> Array:
    """A reward model's scalar (b, t) float32 at each token of this device's rows and context rank; see `token_nats`.
    The ranks of tensor compute it for a piece of the tokens each. Raises ValueError for a model without such a head."""
    if model.score is None:
        raise ValueError("the model has no head for scores; expected ModelConfig.score_head = True")
    with jax.named_scope("score"):
        found_bt, ranks = embedding.scores(plan.deal(h_btd), model.score, plan), plan.size("tensor")
        mine_t = jnp.repeat(jnp.arange(ranks), found_bt.shape[1]) == plan.index("tensor")
        # A sum with zeros, not a gather, since its type is one value on all ranks of tensor, whose gradient counts
        # once.
        return plan.sum(jnp.where(mine_t, jnp.tile(found_bt, (1, ranks)), 0), "tensor")


def judge(h_btd: Array, model: LanguageModel, targets_bt: Array, plan: Plan) -> cross_entropy.Judged:
    """The log-likelihood (b, t) float32 of each target, and whether it is the most likely token; see `token_nats`. Both
    are constants to a gradient, so that an objective can measure them."""
    with jax.named_scope("cross_entropy"):
        operands, settings = _read(h_btd, model, plan)
        del settings["implementation"]  # this kernel has only one
        found = cross_entropy.judge(*jax.lax.stop_gradient(operands), targets_bt.reshape(-1), **settings)
        return cross_entropy.Judged(*(x_n.reshape(targets_bt.shape) for x_n in found))


def distilled(
    h_btd: Array,
    model: LanguageModel,
    teacher: divergence.Hidden | divergence.Likely,
    targets_bt: Array,
    weights_bt: Array,
    *,
    mix: divergence.Mix,
    plan: Plan,
) -> divergence.Distilled:
    """Weighted sums of the divergence from a teacher and of the nats of the targets (b, t), for this device's rows and
    context rank; see `token_nats`. teacher: of the same tokens, flattened as these, whole on every rank of `tensor`,
    with this rank's columns of its head."""
    with jax.named_scope("divergence"):
        operands, settings = _read(h_btd, model, plan)
        targets = targets_bt.reshape(-1), weights_bt.reshape(-1)
        return divergence.distilled(*operands, teacher, *targets, mix=mix, **settings)


def most_likely(h_btd: Array, model: LanguageModel, count: int, plan: Plan) -> divergence.Likely:
    """The `count` most likely tokens (b, t, k) after each, for this device's rows and context rank; see `token_nats`.
    Raises ValueError if the vocabulary has fewer."""
    with jax.named_scope("most_likely"):
        operands, settings = _read(h_btd, model, plan)
        del settings["implementation"]  # this kernel has only one
        reduce = Reduce(settings.pop("reduce_max"), settings.pop("reduce_sum"))
        gather = lambda x_nk: plan.gather(x_nk, "vocab", dim=1)  # noqa: E731
        found = divergence.most_likely(*operands, count, reduce=reduce, gather=gather, **settings)
        rows = len(h_btd) if plan.stream != "rows" else len(h_btd) * plan.size("tensor")
        apart = lambda x_nk: plan.agreed(x_nk.reshape(rows, -1, count), "batch", "context", None)  # noqa: E731
        return divergence.Likely(*map(apart, found))


def _read(h_btd: Array, model: LanguageModel, plan: Plan) -> tuple[tuple[Array, Array], dict[str, Any]]:
    """The operands and settings that the head's kernels share."""
    head_dv = model.head_matrix(plan)
    x_btd = plan.enter(h_btd)
    padded = head_dv.shape[1] * plan.size("vocab") > model.vocab_size
    settings = {
        "chunk": plan.config.logit_rows,
        "vocab_start": plan.index("vocab") * head_dv.shape[1],
        "vocab_size": model.vocab_size if padded else None,
        "reduce_max": lambda x: plan.max(x, "vocab"),
        "reduce_sum": lambda x: plan.sum(x, "vocab"),
        "implementation": plan.config.cross_entropy,
    }
    return (x_btd.reshape(-1, x_btd.shape[-1]), head_dv), settings
