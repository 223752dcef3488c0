"""Attention over a sequence that is sharded over context ranks, by the method that the plan names.

Letters: b batch, t queries of this rank, s keys of the whole sequence, h query heads, g key heads, k head size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.attention import attention
from orogen.model.cache import Reading
from orogen.model.context_blocks import plain
from orogen.model.context_fused import KERNELS, fused
from orogen.model.context_ring import around, gathered, halves, rejoined, visible
from orogen.model.context_ssm import heads_for_sequence
from orogen.model.context_sums import Given, Keys, Method, Queries, Sums, merge, unseen_unless
from orogen.parallel.context import indices, to_tokens, whole
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like


@jax.named_scope("core")
def attend(
    q_bthk: Array,
    k_btgk: Array,
    v_btgk: Array,
    segments_bt: Array,
    plan: Plan,
    *,
    reading: Reading | None = None,
    sinks_h: Array | None = None,
    window: int | None = None,
    scale: float,
) -> Array:
    """Outputs (b, t, h, k) of `kernels.attention` for this rank's queries against the whole sequence.

    With a kernel of `context_fused`, padding that recurs in a row counts as several documents. reading: how queries
    read the keys of a cache, which holds all tokens so far on every rank.
    """
    implementation = plan.config.attention
    kernel = partial(attention, implementation=implementation, window=window, scale=scale)
    kept = partial(checkpoint_name, name="attention")
    if plan.size("context") == 1 or reading is not None:
        where = {} if reading is None else reading._asdict()
        where.pop("values", None)
        y_bthk = kernel(q_bthk, k_btgk, v_btgk, segments_bt=segments_bt, sinks_h=sinks_h, **where)
        return y_bthk if implementation == "cudnn" else kept(y_bthk)  # cuDNN's output has the name already
    if plan.config.context_attention == "alltoall":
        q_bshk, k_bsgk, v_bsgk = heads_for_sequence((q_bthk, k_btgk, v_btgk), plan)
        sinks_h = None if sinks_h is None else plan.piece(sinks_h, "context", dim=0)
        y_bshk = kernel(q_bshk, k_bsgk, v_bsgk, segments_bt=whole(segments_bt, plan), sinks_h=sinks_h)
        return kept(to_tokens(y_bshk, plan))
    if plan.config.context_attention == "allgather" and implementation not in KERNELS:
        k_bsgk, v_bsgk, kv_segments_bs = (whole(a, plan) for a in (k_btgk, v_btgk, segments_bt))
        return kept(kernel(
            q_bthk, k_bsgk, v_bsgk, segments_bt=segments_bt, kv_segments_bs=kv_segments_bs,
            q_index=indices(q_bthk.shape[1], plan), sinks_h=sinks_h,
        ))  # fmt: skip
    if implementation in KERNELS and (window is not None or sinks_h is not None):
        raise ValueError(f"implementation={implementation!r} with window={window} or sinks: expected neither")
    operands = vary_like((q_bthk, k_btgk, v_btgk), (q_bthk, k_btgk, v_btgk, segments_bt))
    sums: Any = _by_parts((*operands, segments_bt), plan, _Options(window, scale))
    y_bthk, lse_bth = sums
    if sinks_h is not None:  # they join the softmax last, with nothing to add to the output
        y_bthk *= jax.nn.sigmoid(lse_bth - sinks_h.astype(jnp.float32))[..., None]
    return y_bthk.astype(q_bthk.dtype)


class _Options(NamedTuple):
    window: int | None
    scale: float


def _method(plan: Plan, options: _Options) -> Method:
    implementation = plan.config.attention
    if implementation in KERNELS:
        return fused(implementation, options.scale)
    return plain(window=options.window, scale=options.scale, blocked=implementation == "blocked")


def _visits(plan: Plan):
    return around if plan.config.context_attention == "ring" else gathered


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _by_parts(operands: tuple[Array, ...], plan: Plan, options: _Options) -> tuple[Array, Array]:
    """Outputs (b, t, h, k) and float32 log-sum-exps (b, t, h) of queries, keys, values and segments. The outputs are
    float32, but have the queries' dtype with a fused kernel, whose gradient requires that."""
    return _forward(operands, plan, options)[0]


def _forward(operands, plan, options):
    q_bthk, k_btgk, v_btgk, segments_bt = operands
    time, method = q_bthk.shape[1], _method(plan, options)
    queries = Queries(q_bthk, segments_bt, indices(time, plan))
    own = k_btgk, v_btgk, segments_bt

    def step(parts: tuple[Sums, Sums], keys: tuple[Array, Array, Array], owner: Array):
        first, second = parts
        one, other, ahead = visible(queries, Keys(*keys, indices(time, plan, owner)), owner, plan)
        a, b = method.attend_pairs(one, other)
        first = merge(first, unseen_unless(ahead, a))
        return (first, merge(merge(second, unseen_unless(~ahead, a)), b)), ()

    sums = method.attend_own(queries, Keys(*own, queries.index_t))
    parts, _ = _visits(plan)(step, halves(sums), own, (), plan)
    y_bthk, lse_bth = rejoined(*parts)
    if plan.config.attention in KERNELS:
        y_bthk = y_bthk.astype(q_bthk.dtype)
    y_bthk, lse_bth = (checkpoint_name(a, "attention") for a in (y_bthk, lse_bth))
    return (y_bthk, lse_bth), (*operands, y_bthk, lse_bth)


def _backward(plan, options, saved, cotangents):
    """Visits the keys of all ranks once more; the gradients of keys and values arrive on their own rank."""
    q_bthk, *own, y_bthk, lse_bth = saved
    dy_bthk, dlse_bth = cotangents
    # Otherwise XLA may merge the exchanges of both passes, and hold other ranks' keys from one pass to the other.
    (k_btgk, v_btgk, segments_bt), dy_bthk = lax.optimization_barrier((own, dy_bthk))
    own = k_btgk, v_btgk, segments_bt
    time, method = q_bthk.shape[1], _method(plan, options)
    queries = Queries(q_bthk, segments_bt, indices(time, plan))
    delta_bth = jnp.sum(dy_bthk.astype(jnp.float32) * y_bthk.astype(jnp.float32), -1) - dlse_bth
    query_side = queries, Given(y_bthk, dy_bthk, lse_bth, delta_bth)

    def step(dq: tuple[Array, Array], keys: tuple[Array, Array, Array], owner: Array):
        dq_first, dq_second = dq
        one, other, ahead = visible(query_side, Keys(*keys, indices(time, plan, owner)), owner, plan)
        (dq_a, d_a), (dq_b, d_b) = method.pull_pairs(one, other)
        dq_first += jnp.where(ahead, dq_a, 0)
        dq_second += jnp.where(ahead, dq_b, dq_a + dq_b)

        def of_parts(a, b):  # both blocks have the first part's keys, or one block has each part's
            return rejoined(jnp.where(ahead, a + b, a), jnp.where(ahead, 0, b))

        return (dq_first, dq_second), jax.tree.map(of_parts, d_a, d_b)

    dq_bthk, dkv = method.pull_own(query_side, Keys(*own, queries.index_t))
    dq, (dk_btgk, dv_btgk) = _visits(plan)(step, halves(dq_bthk), own, dkv, plan)
    dq_bthk = rejoined(*dq)
    return ((dq_bthk.astype(q_bthk.dtype), dk_btgk.astype(k_btgk.dtype), dv_btgk.astype(v_btgk.dtype), None),)


_by_parts.defvjp(_forward, _backward)
