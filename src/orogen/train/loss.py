"""The loss of a batch, as sums and counts over this device's tokens: an objective of the model's hidden states, and the
router losses.

Letters: b batch, t time, d model, e experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from orogen.config.model import ModelConfig
from orogen.data.packing import Batch
from orogen.layers.documents import Documents
from orogen.model.block import Repeat, repeats
from orogen.model.by_letter import stacked
from orogen.model.cache import both, caches, map_layers, without_caches
from orogen.model.lm import LanguageModel
from orogen.model.mtp import shifted_segments
from orogen.model.stages import MOE
from orogen.model.streams import streams, unwatched, watching
from orogen.moe.layer import MoEStats, Replay
from orogen.moe.router import Balance, global_balance
from orogen.parallel.plan import Plan
from orogen.parallel.varying import varying_axes
from orogen.train.task import ByName, Objective

# An extra of a batch (b, t, l, k) int32: the experts that replace a token's own choice in each of the backbone's layers
# of experts, in the order of the pattern; negative where there is nothing to replace it with.
ROUTING = "routing"


class Counts(NamedTuple):
    """Denominators over the global batch. metrics: the objective's, by name; tokens, rows: numbers of tokens and of
    sequences that have any, one entry for the backbone and one per deeper prediction."""

    metrics: ByName
    tokens: Array
    rows: Array


class Sums(NamedTuple):
    """The sums of a batch. metrics: the objective's; load: assignments per expert, in the order of the buffers' leaves;
    dropped: assignments beyond an expert's capacity; overflow: assignments that did not fit into a buffer; choices: per
    depth, a tree like the stack's statistics with a Choice for each MoE layer; carried: the backbone's states after the
    batch, if it was given states to continue."""

    metrics: ByName
    load: list[Array]
    dropped: Array
    overflow: Array
    choices: tuple[Any, ...]
    carried: Any = None


def batch_counts(batch: Batch, objective: Objective, depths: int, plan: Plan) -> Counts:
    """The counts of `batch`, this device's part of the global batch, summed over all devices."""
    segments = [shifted_segments(batch.segments_bt, depth, plan) for depth in range(depths + 1)]
    tokens = jnp.stack([jnp.sum(s != 0, dtype=jnp.float32) for s in segments])
    # A sequence counts once, even if several context ranks hold tokens of it.
    rows = jnp.stack([jnp.sum(plan.max((s != 0).any(1).astype(jnp.float32), "context")) for s in segments])
    return Counts(_total(objective.counts(batch, depths, plan), plan), *plan.total((tokens, rows)))


def _total(values: ByName, plan: Plan) -> ByName:
    """`Plan.total` of the values in float32; those that vary over the same axes share one collective.

    Raises ValueError if a value is replicated over ranks that hold different sequences: it would not be summed over
    them.
    """
    groups: dict[frozenset[str], ByName] = {}
    for name in sorted(values):
        axes = varying_axes(values[name])
        if missing := sorted(set(plan.rules["batch"]) - axes):
            raise ValueError(f"{name!r} is equal on the ranks of {missing}; expected a sum over each rank's tokens")
        groups.setdefault(axes, {})[name] = jnp.asarray(values[name], jnp.float32)
    found = {}
    for group in groups.values():
        vector, apart = ravel_pytree(group)
        found |= apart(plan.total(vector))
    return found


# Per stack in the order in which they run, and per MoE layer of it: arrays (…, e) like `Balance.counts`.
Assigned = list[list[Array]]


class Passed(NamedTuple):
    """The results of some of the layers on a batch. x_btd: the residual stream after them or, after the head, the final
    hidden states; loss: this batch's share of the global loss; metrics: the objective's sums, 0 before the head (both
    summed over the devices of a stage); stats: of each stack of layers, in the order in which they ran; carried: see
    Sums; streams: the residual streams after the layers that are watched."""

    x_btd: Array
    loss: Array
    metrics: ByName
    stats: tuple[Any, ...]
    carried: Any = None
    streams: Sequence[Array] = ()


def loss_share(
    model: LanguageModel,
    batch: Batch,
    counts: Counts,
    *,
    objective: Objective,
    config: ModelConfig,
    plan: Plan,
    replay: Any = None,
    assigned: Assigned | None = None,
    carried: Any = None,
) -> tuple[Array, Sums]:
    """This batch's share of the loss of the global batch that `counts` describes, and its sums.

    Shares of microbatches add up to the loss. Metrics and loads are already summed over devices. assigned: the
    assignments of the global batch, for routers that are balanced over it; None: this batch is all of it. carried: the
    backbone's states that this batch's sequences continue; None: every sequence starts afresh.
    """
    x_btd = embed(model, batch, plan)
    common: Any = {"config": config, "plan": plan}
    passed = run_backbone(
        model, x_btd, batch, counts, replay=replay and replay[:1], assigned=assigned and assigned[:1],
        carried=carried, watched=objective.watched, **common,
    )  # fmt: skip
    passed = run_head(
        model, passed, batch, counts, objective=objective, replay=replay and replay[1:],
        assigned=assigned and assigned[1:], **common,
    )  # fmt: skip
    first, *deeper = ([s.load for s in moe_stats(stats)] for stats in passed.stats)
    idle = [] if deeper else _no_load(repeats(config.layers.mtp), config.n_routed_experts)
    load = first + idle + [sum(parts) for parts in zip(*deeper, strict=True)]
    choices = tuple(map_moe(lambda s: s.choice, tree) for tree in passed.stats)
    metrics = jax.lax.stop_gradient(passed.metrics)
    return passed.loss, Sums(metrics, plan.total(load), *drops(passed.stats, plan), choices, passed.carried)


def _no_load(items: tuple[str | Repeat, ...], experts: int, stacked: tuple[int, ...] = ()) -> list[Array]:
    """The load of a stack that does not run: zeros."""
    found = []
    for item in items:
        if isinstance(item, Repeat):
            found += _no_load(item.items, experts, (*stacked, item.count))
        elif item == MOE:
            found.append(jnp.zeros((*stacked, experts)))
    return found


def embed(model: LanguageModel, batch: Batch, plan: Plan) -> Array:
    """The embedded tokens (b, t, d), laid out as the residual stream."""
    return model.embedding(batch.tokens_bt, Documents(batch.segments_bt, batch.positions_bt), plan)


def run_backbone(
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
    watched: Sequence[int] = (),
) -> Passed:
    """The results of the backbone's layers, with the losses of their routers."""
    docs = Documents(batch.segments_bt, batch.positions_bt)
    given = both(_given(model, batch, plan, replay, carried), model.given_images(batch.extras, plan))
    x_btd, kept = model.backbone(x_btd, docs, plan, both(given, watching(config.layers.main, watched)))
    found = streams(config.layers.main, kept, watched)
    kept = unwatched(kept) if watched else kept
    stats, left = without_caches(kept), carried and caches(kept)
    known = None if assigned is None else assigned[0]
    loss = _router_loss(moe_stats(stats), counts, plan, depth=0, applications=1, config=config, assigned=known)
    return Passed(x_btd, loss, jax.tree.map(jnp.zeros_like, counts.metrics), (stats,), left, found)


def _given(model: LanguageModel, batch: Batch, plan: Plan, replay: Any, carried: Any) -> Any:
    """The choices that the backbone's routers take in place of their own, and the states that other layers continue."""
    chosen = replay and replay[0]
    if ROUTING in batch.extras:
        mine = lambda x: plan.deal(plan.own(x))  # noqa: E731
        experts_lbtk = jnp.moveaxis(mine(batch.extras[ROUTING]), 2, 0)
        there_bt1 = mine(batch.segments_bt)[..., None] != 0  # padding is dropped, as by the router itself
        of_layers = Replay(experts_lbtk, jnp.broadcast_to(there_bt1, experts_lbtk.shape))
        chosen = stacked({MOE: of_layers}, model.backbone.items)
    return both(chosen, _resumed(carried, batch))


def _resumed(carried: Any, batch: Batch) -> Any:
    """`carried` as the layers take it: continued documents have the ids that they have in this batch."""
    first_b, continues_b = batch.segments_bt[:, 0], batch.positions_bt[:, 0] > 0
    return map_layers(lambda states: states and states.renamed(first_b, continues_b), carried)


def run_head(
    model: LanguageModel,
    passed: Passed,
    batch: Batch,
    counts: Counts,
    *,
    objective: Objective,
    config: ModelConfig,
    plan: Plan,
    replay: Any,
    assigned: Assigned | None = None,
) -> Passed:
    """`passed` with what follows the last layer: the final norm, the MTP block's depths, and the losses.

    loss = the objective's + the routers' (balance averaged over sequences, or of the global batch; z over tokens; both
    averaged over the depths of a repeated block). Sources: arXiv:2412.19437, eq. 24-25; arXiv:2512.20856.
    """
    docs = Documents(batch.segments_bt, batch.positions_bt)
    with jax.named_scope("final_norm"):
        h_btd = model.norm(passed.x_btd, plan)
    deeper = model.deeper(h_btd, batch.tokens_bt, docs, plan, replay) if objective.deeper else []
    watched = {"streams": passed.streams} if objective.watched else {}
    metrics = _total(objective.sums(model, [h_btd, *(h for h, _ in deeper)], batch, plan, **watched), plan)
    made, counted = (jax.tree.map(jnp.shape, values) for values in (metrics, counts.metrics))
    if made != counted:
        raise ValueError(f"an objective's sums are {made}; expected the names and shapes of its counts, {counted}")
    loss = passed.loss + objective.loss(metrics, counts.metrics, config)
    for depth, (_, stats) in enumerate(deeper, 1):
        known = None if assigned is None else assigned[depth - 1]
        loss += _router_loss(
            moe_stats(stats), counts, plan, depth=depth, applications=len(deeper), config=config, assigned=known
        )
    return Passed(h_btd, loss, metrics, (*passed.stats, *(stats for _, stats in deeper)), passed.carried)


class Drops(NamedTuple):
    """Assignments beyond an expert's capacity, and those that did not fit into a buffer, float32."""

    dropped: Array
    overflow: Array


def drops(stats: tuple[Any, ...], plan: Plan) -> Drops:
    """The assignments without an expert in these statistics, summed over a stage's devices."""

    def total(field: str) -> Array:
        return plan.total(sum((getattr(s, field).sum() for s in moe_stats(stats)), start=jnp.zeros(())))

    return Drops(total("dropped"), total("overflow"))


def _router_loss(
    layers: list[MoEStats],
    counts: Counts,
    plan: Plan,
    *,
    depth: int,
    applications: int,
    config: ModelConfig,
    assigned: list[Array] | None,
) -> Array:
    """The router losses of one of `applications` applications of a stack, that to the tokens of `depth`.

    assigned: see `loss_share`; by layer.
    """
    sequences, tokens = (jnp.maximum(count[depth], 1) for count in (counts.rows, counts.tokens))
    loss = jnp.zeros(())
    for index, stats in enumerate(layers):
        balance: Any = stats.losses.balance
        if isinstance(balance, Balance):
            found, z = plan.total((balance, stats.losses.z.sum()))
            known = found.counts if assigned is None else assigned[index]
            balanced = global_balance(known, found.mass, tokens, k=config.num_experts_per_tok)
        else:
            total, z = plan.total((balance.sum(), stats.losses.z.sum()))
            balanced = total / sequences
        loss += config.router_aux_loss_coef * balanced / applications
        loss += config.router_z_loss_coef * z / tokens / applications
    return loss


def assignments(
    model: LanguageModel, batch: Batch, plan: Plan, *, deeper: bool, replay: Any = None, carried: Any = None
) -> Assigned:
    """The assignments of `batch` per expert, over all devices, as `loss_share` takes them; from a forward pass without
    heads. deeper: whether the MTP block runs."""
    docs = Documents(batch.segments_bt, batch.positions_bt)
    given = both(_given(model, batch, plan, replay, carried), model.given_images(batch.extras, plan))
    h_btd, kept = model.hidden(batch.tokens_bt, docs, plan, given)
    below = model.deeper(h_btd, batch.tokens_bt, docs, plan, replay and replay[1:]) if deeper else []
    return [plan.total(counted(each)) for each in (without_caches(kept), *(stats for _, stats in below))]


def counted(stats: Any) -> list[Array]:
    """Per MoE layer of a stack, the assignments that balancing over the global batch counts."""
    losses: list[Any] = [layer.losses.balance for layer in moe_stats(stats)]
    return [loss.counts for loss in losses]


def moe_stats(stats: Any) -> list[MoEStats]:
    """The MoEStats in the tree, in its order; other layers may keep other statistics."""
    return [x for x in jax.tree.leaves(stats, is_leaf=_is_moe) if _is_moe(x)]


def map_moe(function: Callable[[MoEStats], Any], stats: Any) -> Any:
    """`stats` with `function` applied to each MoE layer's, and None for other layers' statistics."""
    return jax.tree.map(lambda x: function(x) if _is_moe(x) else None, stats, is_leaf=_is_moe)


def _is_moe(x: Any) -> bool:
    return isinstance(x, MoEStats)
