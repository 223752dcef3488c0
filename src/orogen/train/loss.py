"""The training objective of a batch, as sums and counts over this device's rows.

Letters: b batch, t time, d model, n tokens, v vocabulary, k experts per token, l layers, e experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.config.model import ModelConfig
from orogen.data.packing import NEXT, NEXT_WEIGHT, Batch
from orogen.kernels.cross_entropy import cross_entropy
from orogen.layers.documents import Documents
from orogen.model.cache import both, caches, map_layers, without_caches
from orogen.model.lm import LanguageModel
from orogen.model.mtp import shifted_segments
from orogen.moe.layer import MoEStats
from orogen.moe.router import Balance, global_balance
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
    a tree like the stack's statistics, with a Choice where an MoE layer is; carried: the backbone's states behind the
    rows, if it was given those before them."""

    nats: Array
    load: list[Array]
    dropped: Array
    overflow: Array
    choices: tuple[Any, ...]
    carried: Any = None


def targets(batch: Batch, depth: int, plan: Plan) -> Array:
    """The token (b, t) that position t predicts at this depth: t + 1 + depth, by NEXT if the batch names it."""
    return batch.extras[NEXT] if depth == 0 and NEXT in batch.extras else later(batch.tokens_bt, depth + 1, plan)


def target_weights(batch: Batch, depth: int, plan: Plan) -> Array:
    """Weight (b, t) of predicting token t + 1 + depth from position t: the token's own, inside one document only."""
    if depth == 0 and NEXT in batch.extras:
        return batch.extras[NEXT_WEIGHT]
    inside_bt = shifted_segments(batch.segments_bt, depth + 1, plan) != 0
    return jnp.where(inside_bt, later(batch.weights_bt, depth + 1, plan), 0)


def batch_counts(batch: Batch, depths: int, plan: Plan) -> Counts:
    """The counts of `batch`, this device's rows, summed over all devices."""
    segments = [shifted_segments(batch.segments_bt, depth, plan) for depth in range(depths + 1)]
    counts = Counts(
        jnp.stack([target_weights(batch, depth, plan).sum() for depth in range(depths + 1)]),
        jnp.stack([jnp.sum(s != 0, dtype=jnp.float32) for s in segments]),
        # A row counts once, even if several context ranks hold tokens of it.
        jnp.stack([jnp.sum(plan.max((s != 0).any(1).astype(jnp.float32), "context")) for s in segments]),
    )
    return plan.total(counts)


# For each stack in the order in which they run, and each of its MoE layers, arrays (…, e) as `Balance.counts`.
Assigned = list[list[Array]]


class Passed(NamedTuple):
    """What layers make of a batch. x_btd: the residual stream behind them, or, behind the head, the normed hidden
    state; loss: this batch's share of the global batch's, over all devices of a stage, as is nats, of which there is an
    entry as in Counts, 0 before the head; stats: those of each stack of layers, in the order in which they ran;
    carried: see Sums."""

    x_btd: Array
    loss: Array
    nats: Array
    stats: tuple[Any, ...]
    carried: Any = None


def objective(
    model: LanguageModel,
    batch: Batch,
    counts: Counts,
    *,
    config: ModelConfig,
    plan: Plan,
    replay: Any = None,
    assigned: Assigned | None = None,
    carried: Any = None,
) -> tuple[Array, Sums]:
    """This batch's share of the loss of the global batch that `counts` describes, and its sums.

    Shares of microbatches add up to the loss. Nats and loads are already summed over devices. assigned: of the global
    batch, where routers are balanced over it; None: this batch is all of it. carried: the backbone's states behind the
    rows that this batch's go on with; None: each row is alone.
    """
    x_btd = embed(model, batch, plan)
    common: Any = {"config": config, "plan": plan}
    passed = enter(
        model, x_btd, batch, counts, replay=replay and replay[:1], assigned=assigned and assigned[:1],
        carried=carried, **common,
    )  # fmt: skip
    passed = leave(
        model, passed, batch, counts, replay=replay and replay[1:], assigned=assigned and assigned[1:], **common
    )
    moe = [moe_stats(stats) for stats in passed.stats]
    load = [s.load for s in moe[0]] + [
        sum(parts) for parts in zip(*([s.load for s in m] for m in moe[1:]), strict=True)
    ]
    choices = tuple(map_moe(lambda s: s.choice, tree) for tree in passed.stats)
    nats = jax.lax.stop_gradient(passed.nats)
    return passed.loss, Sums(nats, plan.total(load), *lost(passed.stats, plan), choices, passed.carried)


def embed(model: LanguageModel, batch: Batch, plan: Plan) -> Array:
    """The embedded tokens, (b, t of this rank's sequence piece, d)."""
    return model.embedding(batch.tokens_bt, Documents(batch.segments_bt, batch.positions_bt), plan)


def enter(
    model: LanguageModel,
    x_btd: Array,
    batch: Batch,
    counts: Counts,
    *,
    config: ModelConfig,
    plan: Plan,
    replay: Any,
    assigned: Assigned | None = None,
    carried: Any = None,
    ends: tuple[bool, bool] = (True, True),
) -> Passed:
    """The backbone's layers, with their routers' losses. ends: whether these have the model's first layer and last."""
    docs = Documents(batch.segments_bt, batch.positions_bt)
    given = both(replay and replay[0], _behind(carried, batch))
    x_btd, kept = model.backbone(x_btd, docs, plan, given, ends=ends)
    stats, left = without_caches(kept), carried and caches(kept)
    known = None if assigned is None else assigned[0]
    loss = _router_loss(moe_stats(stats), counts, 0, 1, config, plan, known)
    return Passed(x_btd, loss, jnp.zeros(len(counts.targets)), (stats,), left)


def _behind(carried: Any, batch: Batch) -> Any:
    """`carried` as the layers are given it: with this batch's ids of the documents that its rows go on with."""
    first_b, continues_b = batch.segments_bt[:, 0], batch.positions_bt[:, 0] > 0
    return map_layers(lambda states: states and states.renamed(first_b, continues_b), carried)


def leave(
    model: LanguageModel,
    passed: Passed,
    batch: Batch,
    counts: Counts,
    *,
    config: ModelConfig,
    plan: Plan,
    replay: Any,
    assigned: Assigned | None = None,
) -> Passed:
    """`passed` with what comes behind the last layer: the final norm, the MTP block's depths, and the losses.

    loss = nats_0 / targets_0 + scale / D · Σ_depth nats_d / targets_d + the routers' losses (balance averaged over
    rows, or of the global batch; z over tokens; both averaged over the depths of a repeated block). Sources:
    arXiv:2412.19437, eq. 24-25; arXiv:2512.20856.
    """
    docs = Documents(batch.segments_bt, batch.positions_bt)
    h_btd = model.norm(passed.x_btd, plan)
    deeper = model.deeper(h_btd, batch.tokens_bt, docs, plan, replay)
    hidden = [h_btd] + [h for h, _ in deeper]
    predicted = [token_nats(h, model, batch, depth, plan) for depth, h in enumerate(hidden)]
    nats = plan.total(jnp.stack(predicted))
    share = jnp.asarray([1.0] + [config.mtp_loss_scale / len(deeper) for _ in deeper])
    loss = passed.loss + jnp.sum(share * nats / jnp.maximum(counts.targets, 1))
    for depth, (_, stats) in enumerate(deeper, 1):
        known = None if assigned is None else assigned[depth - 1]
        loss += _router_loss(moe_stats(stats), counts, depth, len(deeper), config, plan, known)
    return Passed(h_btd, loss, nats, (*passed.stats, *(stats for _, stats in deeper)), passed.carried)


def lost(stats: tuple[Any, ...], plan: Plan) -> tuple[Array, Array]:
    """Assignments beyond an expert's capacity, and beyond a buffer's room, over all devices of a stage."""
    dropped, overflow = (
        plan.total(sum((getattr(s, field).sum() for s in moe_stats(stats)), start=jnp.zeros(())))
        for field in ("dropped", "overflow")
    )
    return dropped, overflow


def next_token_nats(model: LanguageModel, batch: Batch, plan: Plan) -> Array:
    """Nats of the next-token targets of the global batch."""
    docs = Documents(batch.segments_bt, batch.positions_bt)
    h_btd, _ = model.hidden(batch.tokens_bt, docs, plan)
    return plan.total(token_nats(h_btd, model, batch, 0, plan))


def token_nats(h_btd: Array, model: LanguageModel, batch: Batch, depth: int, plan: Plan) -> Array:
    """Weighted nats of the tokens depth + 1 ahead, of this device's rows, by the model's head."""
    head_dv = model.head_matrix(plan)
    x_btd = plan.gather(h_btd, "sequence")
    with jax.named_scope("cross_entropy"):
        return cross_entropy(
            x_btd.reshape(-1, x_btd.shape[-1]),
            head_dv,
            targets(batch, depth, plan).reshape(-1),
            target_weights(batch, depth, plan).reshape(-1),
            chunk=plan.config.logit_rows,
            vocab_start=plan.index("vocab") * head_dv.shape[1],
            vocab_size=model.vocab_size if head_dv.shape[1] * plan.size("vocab") > model.vocab_size else None,
            reduce_max=lambda x: plan.max(x, "vocab"),
            reduce_sum=lambda x: plan.sum(x, "vocab"),
            implementation=plan.config.cross_entropy,
        )


def _router_loss(
    layers: list[MoEStats],
    counts: Counts,
    depth: int,
    applications: int,
    config: ModelConfig,
    plan: Plan,
    assigned: list[Array] | None,
) -> Array:
    """The routers' losses of a stack that is applied so many times, of which this is one, to the tokens of `depth`.

    assigned: see `objective`, by layer.
    """
    rows, tokens = (jnp.maximum(count[depth], 1) for count in (counts.rows, counts.tokens))
    loss = jnp.zeros(())
    for index, stats in enumerate(layers):
        balance: Any = stats.losses.balance
        if isinstance(balance, Balance):
            found, z = plan.total((balance, stats.losses.z.sum()))
            known = found.counts if assigned is None else assigned[index]
            balanced = global_balance(known, found.mass, tokens, k=config.num_experts_per_tok)
        else:
            total, z = plan.total((balance.sum(), stats.losses.z.sum()))
            balanced = total / rows
        loss += config.router_aux_loss_coef * balanced / applications
        loss += config.router_z_loss_coef * z / tokens / applications
    return loss


def assignments(model: LanguageModel, batch: Batch, plan: Plan, replay: Any = None, carried: Any = None) -> Assigned:
    """What `batch` adds to the `assigned` of `objective`, over all devices: by a forward pass without heads."""
    docs = Documents(batch.segments_bt, batch.positions_bt)
    h_btd, kept = model.hidden(batch.tokens_bt, docs, plan, both(replay and replay[0], _behind(carried, batch)))
    deeper = model.deeper(h_btd, batch.tokens_bt, docs, plan, replay and replay[1:])
    return [plan.total(counted(each)) for each in (without_caches(kept), *(stats for _, stats in deeper))]


def counted(stats: Any) -> list[Array]:
    """The assignments that balance over the global batch counts, of each MoE layer of a stack."""
    shares: list[Any] = [layer.losses.balance for layer in moe_stats(stats)]
    return [share.counts for share in shares]


def moe_stats(stats: Any) -> list[MoEStats]:
    """Those in the tree, in its order."""
    return jax.tree.leaves(stats, is_leaf=lambda x: isinstance(x, MoEStats))


def map_moe(function: Callable[[MoEStats], Any], stats: Any) -> Any:
    """`stats` with the function of each MoE layer's."""
    return jax.tree.map(function, stats, is_leaf=lambda x: isinstance(x, MoEStats))
