"""The objective of group-relative policy optimisation, as sums over one device's tokens.

Letters: b batch, t time, s sequences of a row.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from orogen.config.rl import RLConfig
from orogen.data.packing import Batch
from orogen.model.heads import log_likelihoods
from orogen.model.lm import LanguageModel
from orogen.parallel.context import later
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like
from orogen.train.task import ByName, Objective

# Extras of a batch (b, t) float32; position i is about token i + 1. WEIGHT: of the token in the mean, 0 where the
# policy did not choose it; ADVANTAGE; IMPORTANCE, the constant π_trainer / π_rollout, corrected; OLD, REFERENCE and
# ROLLOUT: log-probabilities under the weights at the rollout, under the first checkpoint's, and by the engine.
WEIGHT, ADVANTAGE, IMPORTANCE = "weight", "advantage", "importance"
OLD, REFERENCE, ROLLOUT = "old", "reference", "rollout"
MOST_GAP = 20.0  # of log π_ref - log π, beyond which the estimate of the divergence is flat, as in NeMo RL


@dataclasses.dataclass(frozen=True)
class Terms:
    """What of RLConfig the objective reads. on_policy: each batch has one update, so that OLD is the policy itself."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    by_sequence: bool
    kl: float
    kl_estimator: str
    on_policy: bool


def terms_of(rl: RLConfig) -> Terms:
    """The settings of the objective."""
    return Terms(
        clip_low=float(rl.chosen("clip_low")), clip_high=float(rl.chosen("clip_high")), dual_clip=rl.dual_clip,
        by_sequence=rl.algorithm == "gspo", kl=rl.kl, kl_estimator=rl.kl_estimator, on_policy=rl.updates == 1,
    )  # fmt: skip


def policy_objective(terms: Terms) -> Objective:
    """-Σ w_t · IS_t · min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) / Σ w_t + kl · Σ w_t KL_t / Σ w_t.

    r_t = π / π_old of the token or, with gspo, the geometric mean of those of its sequence, through all of which its
    gradient flows. A dual clip bounds r_t A_t from below by dual_clip · A_t where A_t < 0 (arXiv:1912.09729). Measured
    beside: `entropy`, the mean -log π of the chosen tokens, an unbiased estimate; `clipped`, the share of tokens whose
    ratio has no gradient; `gap`, the mean |log π - log π_rollout| of this very pass.
    Sources: arXiv:2402.03300, eq. 3-4; arXiv:2503.14476, eq. 8; arXiv:2507.18071, eq. 5-7.
    """

    def counts(batch: Batch, depths: int, plan: Plan) -> ByName:
        weight_bt = batch.extras[WEIGHT]
        total, tokens = weight_bt.sum(), (weight_bt > 0).astype(jnp.float32).sum()
        means = {"policy": total} | ({"divergence": total} if terms.kl else {})
        return means | {"entropy": tokens, "clipped": tokens, "gap": tokens}

    def sums(model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
        now_bt = log_likelihoods(hidden[0], model, later(batch.tokens_bt, 1, plan), plan)
        extras, weight_bt = batch.extras, batch.extras[WEIGHT]
        chosen_bt = weight_bt > 0
        of_chosen = lambda x_bt: jnp.where(chosen_bt, x_bt, 0)  # noqa: E731
        old_bt = lax.stop_gradient(now_bt) if terms.on_policy else extras[OLD]
        change_bt = of_chosen(now_bt - old_bt)
        if terms.by_sequence:
            change_bt = of_chosen(_sequence_mean(change_bt, chosen_bt, batch.segments_bt, plan))
        loss_bt, clipped_bt = _clipped(jnp.exp(change_bt), extras[ADVANTAGE], terms)
        found = {
            "policy": of_chosen(weight_bt * extras[IMPORTANCE] * loss_bt).sum(),
            "entropy": of_chosen(-now_bt).sum(),
            "clipped": of_chosen(clipped_bt.astype(jnp.float32)).sum(),
            "gap": of_chosen(jnp.abs(now_bt - extras[ROLLOUT])).sum(),
        }
        if terms.kl:
            found["divergence"] = (weight_bt * _divergence(of_chosen(extras[REFERENCE] - now_bt), terms)).sum()
        return found

    shares = {"policy": 1.0} | ({"divergence": terms.kl} if terms.kl else {})
    return Objective(counts=counts, sums=sums, shares=lambda config, depths: shares, deeper=False)


def _clipped(ratio_bt: Array, advantage_bt: Array, terms: Terms) -> tuple[Array, Array]:
    """The loss of each token, and whether its gradient is cut off."""
    bounded_bt = jnp.clip(ratio_bt, 1 - terms.clip_low, 1 + terms.clip_high)
    loss_bt = jnp.maximum(-advantage_bt * ratio_bt, -advantage_bt * bounded_bt)
    cut_bt = (-advantage_bt * bounded_bt > -advantage_bt * ratio_bt) & (bounded_bt != ratio_bt)
    if terms.dual_clip is not None:
        least_bt = -advantage_bt * terms.dual_clip
        beyond_bt = (advantage_bt < 0) & (loss_bt > least_bt)
        loss_bt, cut_bt = jnp.where(beyond_bt, least_bt, loss_bt), cut_bt | beyond_bt
    return loss_bt, cut_bt


def _divergence(gap_bt: Array, terms: Terms) -> Array:
    """k2 or k3 of log π_ref - log π (http://joschu.net/blog/kl-approx.html), 0 where both are equal."""
    gap_bt = jnp.clip(gap_bt, -MOST_GAP, MOST_GAP)
    return jnp.square(gap_bt) / 2 if terms.kl_estimator == "k2" else jnp.exp(gap_bt) - gap_bt - 1


def _sequence_mean(x_bt: Array, chosen_bt: Array, segments_bt: Array, plan: Plan) -> Array:
    """For each token the mean of x over the chosen tokens of its sequence, which several ranks of context may hold."""
    rows, time = x_bt.shape
    row_b1 = jnp.arange(rows)[:, None]

    def summed(values_bt: Array) -> Array:
        # A row has at most as many sequences as tokens; segments count from 1, and 0 is padding.
        start_bs = vary_like(jnp.zeros((rows, time * plan.size("context") + 1)), (values_bt, segments_bt))
        return plan.sum(start_bs.at[row_b1, segments_bt].add(values_bt), "context")

    mean_bs = summed(x_bt) / jnp.maximum(summed(chosen_bt.astype(jnp.float32)), 1)
    return jnp.take_along_axis(mean_bs, segments_bt, axis=1)
