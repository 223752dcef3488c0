"""Losses of pairs of answers: direct preference optimisation, and the Bradley-Terry loss of a reward model.

The documents of a row come in pairs: a chosen answer with its prompt, then the rejected one with the same prompt. Sums
are over pairs, and each is divided by the number of pairs of the global batch.

Letters: b batch (rows), t time, n documents of a row, p pairs of a row, d model.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.config.model import ModelConfig
from orogen.config.preference import BRADLEY_TERRY, IPO, PreferenceConfig
from orogen.data.packing import Batch
from orogen.model.heads import scores
from orogen.model.lm import LanguageModel
from orogen.parallel.context import later
from orogen.parallel.plan import Plan
from orogen.posttrain.documents import answer_lengths, answer_log_probs, document_sums, most_documents
from orogen.train.task import ByName, Objective

# An extra of batches: at the first token of a document, the log-probability of its answer under the reference model.
REFERENCE = "reference"
LOSS, SFT, CENTER = "preference_loss", "sft_loss", "center_loss"
ACCURACY, MARGIN = "accuracy", "margin"
CHOSEN, REJECTED = "chosen_reward", "rejected_reward"
MEASURED = (ACCURACY, MARGIN, CHOSEN, REJECTED)


class Pairs(NamedTuple):
    """One number (b, p) of each pair's two documents."""

    chosen: Array
    rejected: Array


def paired(x_bn: Array) -> Pairs:
    """The documents of each row as pairs."""
    x_bpk = x_bn[:, : x_bn.shape[1] // 2 * 2].reshape(len(x_bn), -1, 2)
    return Pairs(x_bpk[..., 0], x_bpk[..., 1])


def preference(config: PreferenceConfig) -> Objective:
    """The objective of `config.loss`. The multi-token-prediction block does not run."""
    direct = config.loss != BRADLEY_TERRY
    names = (LOSS, SFT if direct else CENTER, *MEASURED)
    weights = {LOSS: config.preference_weight, SFT: config.sft_weight} if direct else {LOSS: 1.0}
    if not direct:
        weights[CENTER] = config.center_weight
    used = {name: weight for name, weight in weights.items() if weight > 0}

    def shares(model: ModelConfig, depths: int) -> Mapping[str, float]:
        return used

    sums = partial(_direct if direct else _bradley_terry, config)
    return Objective(counts=partial(_counts, names), sums=sums, shares=shares, deeper=False)


def _counts(names: tuple[str, ...], batch: Batch, depths: int, plan: Plan) -> ByName:
    """The number of pairs, for each name."""
    pairs = jnp.sum(_present(batch, plan), dtype=jnp.float32)
    return dict.fromkeys(names, pairs)


def _present(batch: Batch, plan: Plan) -> Array:
    """(b, p) bool: whether a row has both documents of a pair."""
    first_bt = (batch.segments_bt > 0) & (batch.positions_bt == 0)
    found = paired(document_sums(first_bt, batch.segments_bt, plan, count=most_documents(batch, plan)))
    return (found.chosen > 0) & (found.rejected > 0)


def _direct(config: PreferenceConfig, model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
    """With the log-ratio h = log π(y) - log π_ref(y) of an answer y, or its average over the answer's tokens, and the
    margin Δ = h(chosen) - h(rejected):

        dpo   -(1 - ε) log σ(β Δ) - ε log σ(-β Δ)      arXiv:2305.18290, eq. 7; label smoothing ε: its authors' cDPO
        ipo   (Δ - 1 / (2 β))²                         arXiv:2310.12036, eq. 17
        sft   -log π(chosen), or its average

    Rewards are β h, and the margin measured is β Δ.
    """
    count = most_documents(batch, plan)
    said_bn = answer_log_probs(hidden[0], model, batch, plan, count=count)
    reference_bn = document_sums(batch.extras[REFERENCE], batch.segments_bt, plan, count=count)
    length_bn = jnp.maximum(answer_lengths(batch, plan, count=count), 1)
    ratio_bn = said_bn - reference_bn
    ratio = paired(ratio_bn / length_bn if config.average_log_probs else ratio_bn)
    margin_bp = ratio.chosen - ratio.rejected
    if config.loss == IPO:
        loss_bp = jnp.square(margin_bp - 1 / (2 * config.beta))
    else:
        right, wrong = jax.nn.log_sigmoid(config.beta * margin_bp), jax.nn.log_sigmoid(-config.beta * margin_bp)
        loss_bp = -(1 - config.label_smoothing) * right - config.label_smoothing * wrong
    chosen_bp = paired(said_bn / length_bn if config.sft_average_log_probs else said_bn).chosen
    rewards = Pairs(*(config.beta * x_bp for x_bp in ratio))
    return _summed({LOSS: loss_bp, SFT: -chosen_bp}, rewards, batch, plan)


def _bradley_terry(
    config: PreferenceConfig, model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan
) -> ByName:
    """-log σ(r(chosen) - r(rejected)) of the scores r at each document's last token (arXiv:2009.01325, eq. 1), and the
    squared sum of the two (arXiv:2312.09244, section 3)."""
    score_bn = last_scores(hidden[0], model, batch, plan, count=most_documents(batch, plan))
    reward = paired(score_bn)
    loss_bp = -jax.nn.log_sigmoid(reward.chosen - reward.rejected)
    return _summed({LOSS: loss_bp, CENTER: jnp.square(reward.chosen + reward.rejected)}, reward, batch, plan)


def last_scores(h_btd: Array, model: LanguageModel, batch: Batch, plan: Plan, *, count: int) -> Array:
    """(b, n) float32: the score of each document, which a reward model gives at its last token."""
    last_bt = (batch.segments_bt > 0) & (later(batch.segments_bt, 1, plan) != batch.segments_bt)
    score_bt = jnp.where(last_bt, scores(h_btd, model, plan), 0)
    return document_sums(score_bt, batch.segments_bt, plan, count=count)


def _summed(losses: Mapping[str, Array], rewards: Pairs, batch: Batch, plan: Plan) -> ByName:
    """The sums over pairs of the losses and of what is measured besides."""
    present_bp = _present(batch, plan)
    margin_bp = rewards.chosen - rewards.rejected
    measured = {ACCURACY: margin_bp > 0, MARGIN: margin_bp, CHOSEN: rewards.chosen, REJECTED: rewards.rejected}
    return {
        name: jnp.where(present_bp, x_bp, 0).sum(dtype=jnp.float32) for name, x_bp in {**losses, **measured}.items()
    }
