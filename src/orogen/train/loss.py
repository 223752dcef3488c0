"""The training objective of a batch, as sums and counts over this device's rows.

Letters: b batch, t time, d model, n tokens, v vocabulary, k experts a token, l layers, e experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.config.model import ModelConfig
from orogen.data.packing import Batch
from orogen.kernels.cross_entropy import cross_entropy
from orogen.layers.documents import Documents
from orogen.model.lm import LanguageModel
from orogen.model.mtp import shifted_segments
from orogen.moe.layer import MoEStats
from orogen.parallel.context import later
from orogen.parallel.plan import Plan


class Counts(NamedTuple):
    """Denominators over the whole global batch, one entry for the next token and one for each deeper prediction:
    weighted targets, tokens and non-empty rows."""

    targets: Array
    tokens: Array
    rows: Array


class Sums(NamedTuple):
    """What a batch adds up to. nats: one entry as in Counts; load: assignments by expert, in the order of the buffers'
    leaves; dropped: assignments beyond an expert's capacity; overflow: beyond a buffer's room; choices: for each depth
    a tree like the stack's statistics, with a Choice where an MoE layer is."""

    nats: Array
    load: list[Array]
    dropped: Array
    overflow: Array
    choices: tuple[Any, ...]


def target_weights(batch: Batch, depth: int, plan: Plan) -> Array:
    """Weight (b, t) of predicting token t + 1 + depth from position t: the token's own, inside one document only."""
    inside_bt = shifted_segments(batch.segments_bt, depth + 1, plan) != 0
    return jnp.where(inside_bt, later(batch.weights_bt, depth + 1, plan), 0)


def batch_counts(batch: Batch, depths: int, plan: Plan) -> Counts:
    """The counts of `batch`, this device's rows, summed over all devices."""
    segments = [shifted_segments(batch.segments_bt, depth, plan) for depth in range(depths + 1)]
    counts = Counts(
        jnp.stack([target_weights(batch, depth, plan).sum() for depth in range(depths + 1)]),
        jnp.stack([jnp.sum(s != 0, dtype=jnp.float32) for s in segments]),
        # A row counts once, however many context ranks hold a token of it.
        jnp.stack([jnp.sum(plan.max((s != 0).any(1).astype(jnp.float32), "context")) for s in segments]),
    )
    return plan.total(counts)


def objective(
    model: LanguageModel, batch: Batch, counts: Counts, *, config: ModelConfig, plan: Plan, replay: Any = None
) -> tuple[Array, Sums]:
    """This batch's share of the loss of the global batch that `counts` describes, and its sums.

    loss = nats_0 / targets_0 + scale / D · Σ_depth nats_d / targets_d + the routers' losses (balance averaged over
    rows, z over tokens, both averaged over the depths of a repeated block). Shares of microbatches add up to the loss.
    Nats and loads are already summed over devices. Sources: arXiv:2412.19437, eq. 24-25; arXiv:2512.20856.
    """
    docs = Documents(batch.segments_bt, batch.positions_bt)
    h_btd, stats = model.hidden(batch.tokens_bt, docs, plan, replay and replay[0])
    deeper = model.deeper(h_btd, batch.tokens_bt, docs, plan, replay and replay[1:])
    hidden = [h_btd] + [h for h, _ in deeper]
    predicted = [token_nats(h, model.head_matrix(plan), batch, depth, plan) for depth, h in enumerate(hidden)]
    nats = plan.total(jnp.stack(predicted))
    moe = [_moe_stats(stats)] + [_moe_stats(s) for _, s in deeper]
    counts = jax.tree.map(lambda c: jnp.maximum(c, 1), counts)
    share = jnp.asarray([1.0] + [config.mtp_loss_scale / len(deeper) for _ in deeper])
    loss = jnp.sum(share * nats / counts.targets) + _router_loss(moe, counts, config, plan)
    load = [s.load for s in moe[0]] + [
        sum(parts) for parts in zip(*([s.load for s in m] for m in moe[1:]), strict=True)
    ]
    dropped, overflow = (
        plan.total(sum((getattr(s, field).sum() for m in moe for s in m), start=jnp.zeros(())))
        for field in ("dropped", "overflow")
    )
    choices = tuple(_map_moe(lambda s: s.choice, tree) for tree in [stats, *(s for _, s in deeper)])
    return loss, Sums(jax.lax.stop_gradient(nats), plan.total(load), dropped, overflow, choices)


def next_token_nats(model: LanguageModel, batch: Batch, plan: Plan) -> Array:
    """Nats of the next-token targets of the global batch."""
    docs = Documents(batch.segments_bt, batch.positions_bt)
    h_btd, _ = model.hidden(batch.tokens_bt, docs, plan)
    return plan.total(token_nats(h_btd, model.head_matrix(plan), batch, 0, plan))


def token_nats(h_btd: Array, head_dv: Array, batch: Batch, depth: int, plan: Plan) -> Array:
    """Weighted nats of the tokens depth + 1 ahead, of this device's rows. head_dv: this rank's part of v."""
    x_btd = plan.gather(h_btd, "sequence")
    with jax.named_scope("cross_entropy"):
        return cross_entropy(
            x_btd.reshape(-1, x_btd.shape[-1]),
            head_dv,
            later(batch.tokens_bt, depth + 1, plan).reshape(-1),
            target_weights(batch, depth, plan).reshape(-1),
            chunk=plan.config.logit_rows,
            vocab_start=plan.index("vocab") * head_dv.shape[1],
            reduce_max=lambda x: plan.max(x, "vocab"),
            reduce_sum=lambda x: plan.sum(x, "vocab"),
            implementation=plan.config.cross_entropy,
        )


def _router_loss(moe: list[list[MoEStats]], counts: Counts, config: ModelConfig, plan: Plan) -> Array:
    loss = jnp.zeros(())
    for depth, layers in enumerate(moe):
        applications = max(len(moe) - 1, 1) if depth else 1
        for stats in layers:
            balance, z = plan.total((stats.losses.balance.sum(), stats.losses.z.sum()))
            loss += config.router_aux_loss_coef * balance / counts.rows[depth] / applications
            loss += config.router_z_loss_coef * z / counts.tokens[depth] / applications
    return loss


def _moe_stats(stats: Any) -> list[MoEStats]:
    return jax.tree.leaves(stats, is_leaf=lambda x: isinstance(x, MoEStats))


def _map_moe(function: Callable[[MoEStats], Any], stats: Any) -> Any:
    return jax.tree.map(function, stats, is_leaf=lambda x: isinstance(x, MoEStats))
