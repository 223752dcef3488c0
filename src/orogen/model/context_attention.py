"""Attention over a sequence that is sharded over context ranks, by the method that the plan names.

Letters: b batch, t queries of this rank, s keys (of the whole sequence, or of a block), h query heads, g key heads,
r query heads per key head, k head size, q queries of a block.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.attention import attention
from orogen.kernels.attention.reference import masked_exp
from orogen.model.cache import Reading
from orogen.model.context_ssm import heads_for_sequence
from orogen.parallel.context import places, to_tokens, whole
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like

LOWEST = float(jnp.finfo(jnp.float32).min)
BLOCK = 64


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

    reading: how queries read the keys, if these are those of all tokens so far, on one rank.
    """
    kernel = partial(attention, implementation=plan.config.attention, window=window, scale=scale)
    kept = partial(checkpoint_name, name="attention")
    if plan.size("context") == 1:
        indices = {} if reading is None else reading._asdict()
        indices.pop("values", None)
        y_bthk = kernel(q_bthk, k_btgk, v_btgk, segments_bt=segments_bt, sinks_h=sinks_h, **indices)
        return y_bthk if plan.config.attention == "cudnn" else kept(y_bthk)  # cuDNN's output has the name already
    if plan.config.context_attention == "allgather":
        k_bsgk, v_bsgk, kv_segments_bs = (whole(a, plan) for a in (k_btgk, v_btgk, segments_bt))
        return kept(kernel(
            q_bthk, k_bsgk, v_bsgk, segments_bt=segments_bt, kv_segments_bs=kv_segments_bs,
            q_index=places(q_bthk.shape[1], plan), sinks_h=sinks_h,
        ))  # fmt: skip
    if plan.config.context_attention == "alltoall":
        q_bshk, k_bsgk, v_bsgk = heads_for_sequence((q_bthk, k_btgk, v_btgk), plan)
        sinks_h = None if sinks_h is None else plan.piece(sinks_h, "context", dim=0)
        y_bshk = kernel(q_bshk, k_bsgk, v_bsgk, segments_bt=whole(segments_bt, plan), sinks_h=sinks_h)
        return kept(to_tokens(y_bshk, plan))
    operands = vary_like((q_bthk, k_btgk, v_btgk), (q_bthk, k_btgk, v_btgk, segments_bt))
    sums: Any = _ring((*operands, segments_bt), plan, _Options(window, scale))
    y_bthk, lse_bth = sums
    if sinks_h is not None:  # they join the softmax last, with nothing to add to the output
        y_bthk *= jax.nn.sigmoid(lse_bth - sinks_h.astype(jnp.float32))[..., None]
    return y_bthk.astype(q_bthk.dtype)


class _Options(NamedTuple):
    window: int | None
    scale: float


class _Queries(NamedTuple):
    """Queries of a block (b, q, g, r, k), their segments (b, q), and their positions in the sequence (q,)."""

    q_bqgrk: Array
    segments_bq: Array
    index_q: Array


class _Keys(NamedTuple):
    """Keys and values (b, s, g, k), their segments (b, s), and their positions in the sequence (s,)."""

    k_bsgk: Array
    v_bsgk: Array
    segments_bs: Array
    index_s: Array


class _Sums(NamedTuple):
    """Attention so far, float32: the output (b, t, g, r, k) over the keys seen, and the logarithm of the sum of their
    exponentials (b, t, g, r); 0 and LOWEST where no key was seen."""

    y_btgrk: Array
    lse_btgr: Array


# The keys of the ranks go round the ring. Each rank's tokens are two parts, the first early and the second late in the
# sequence. So of the four pairs of one of this rank's parts with one of another's, exactly two are visible: the second
# part's queries always see the first part's keys; and either the first part's queries see them too (if the keys' rank
# is before this one), or the second part's queries see the second part's keys as well.


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _ring(operands: tuple[Array, ...], plan: Plan, options: _Options) -> tuple[Array, Array]:
    """Outputs (b, t, h, k) and log-sum-exps (b, t, h), float32, of queries, keys, values and segments."""
    return _ring_forward(operands, plan, options)[0]


def _ring_forward(operands, plan, options):
    q_bthk, k_btgk, v_btgk, segments_bt = operands
    queries, keys = _operands(q_bthk, k_btgk, v_btgk, segments_bt, plan)
    q_first, q_second, k_first, k_second = *_halves(queries), *_halves(keys)
    attend_to = partial(_attend_block, options=options, blocked=plan.config.attention == "blocked")
    first = attend_to(q_first, k_first)
    second = _merge(attend_to(q_second, k_first), attend_to(q_second, k_second))

    def step(carry, _):
        keys, owner, first, second = carry
        keys, owner = _next((keys, owner), plan)
        (q_a, k_a), (q_b, k_b), ahead = _visible(queries, keys, owner, plan)
        a, b = attend_to(q_a, k_a), attend_to(q_b, k_b)
        first = _select(ahead, _merge(first, a), first)
        second = _merge(second, _select(ahead, b, _merge(a, b)))
        return (keys, owner, first, second), None

    owner = vary_like(jnp.asarray(plan.index("context"), jnp.int32), first)
    carry = vary_like((keys, owner, first, second), (keys, first, owner))
    (_, _, first, second), _ = lax.scan(step, carry, None, length=plan.size("context") - 1)
    sums = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first, second)
    shape = q_bthk.shape[:3]
    y_bthk, lse_bth = sums.y_btgrk.reshape(*shape, -1), sums.lse_btgr.reshape(shape)
    y_bthk, lse_bth = (checkpoint_name(a, "attention") for a in (y_bthk, lse_bth))
    return (y_bthk, lse_bth), (q_bthk, k_btgk, v_btgk, segments_bt, y_bthk, lse_bth)


def _ring_backward(plan, options, saved, cotangents):
    """Goes round the ring once more; the gradients of keys and values travel with them and end on their own rank."""
    q_bthk, k_btgk, v_btgk, segments_bt, y_bthk, lse_bth = saved
    queries, keys = _operands(q_bthk, k_btgk, v_btgk, segments_bt, plan)
    dy_bthk, dlse_bth = cotangents
    # d score = p (dp - delta), where delta is the normalisation's share of the gradient.
    delta_bth = jnp.sum(dy_bthk * y_bthk, -1) - dlse_bth
    grouped = lambda a: a.reshape(*a.shape[:2], *queries.q_bqgrk.shape[2:4], *a.shape[3:])  # noqa: E731
    given = _Given(*(grouped(a) for a in (dy_bthk, lse_bth, delta_bth)))
    query_side = (queries, given)
    pull = partial(_pull_block, options=options, blocked=plan.config.attention == "blocked")
    (first, second), (k_first, k_second) = _halves(query_side), _halves(keys)
    (dq_a, d_a), (dq_b, d_b), (dq_c, d_c) = pull(first, k_first), pull(second, k_first), pull(second, k_second)
    dq_first, dq_second = dq_a, dq_b + dq_c
    dkv = jax.tree.map(lambda a, b, c: jnp.concatenate([a + b, c], 1), d_a, d_b, d_c)

    def step(carry, _):
        keys, owner, dkv, dq_first, dq_second = carry
        keys, owner, dkv = _next((keys, owner, dkv), plan)
        (query_side_a, k_a), (query_side_b, k_b), ahead = _visible(query_side, keys, owner, plan)
        (dq_a, d_a), (dq_b, d_b) = pull(query_side_a, k_a), pull(query_side_b, k_b)
        dq_first += jnp.where(ahead, dq_a, 0)
        dq_second += jnp.where(ahead, dq_b, dq_a + dq_b)

        def add(total, a, b):  # both blocks have the first part's keys, or one block has each part's
            to_first, to_second = jnp.where(ahead, a + b, a), jnp.where(ahead, 0, b)
            return total + jnp.concatenate([to_first, to_second], 1)

        return (keys, owner, jax.tree.map(add, dkv, d_a, d_b), dq_first, dq_second), None

    owner = vary_like(jnp.asarray(plan.index("context"), jnp.int32), dq_first)
    carry = vary_like((keys, owner, dkv, dq_first, dq_second), (keys, dq_first, owner))
    (_, _, dkv, dq_first, dq_second), _ = lax.scan(step, carry, None, length=plan.size("context") - 1)
    dk_btgk, dv_btgk = _next(dkv, plan)
    dq_bthk = jnp.concatenate([dq_first, dq_second], 1).reshape(q_bthk.shape)
    return ((dq_bthk.astype(q_bthk.dtype), dk_btgk.astype(k_btgk.dtype), dv_btgk.astype(v_btgk.dtype), None),)


_ring.defvjp(_ring_forward, _ring_backward)


class _Given(NamedTuple):
    """Per query: the output's cotangent (b, q, g, r, k), the log-sum-exp and delta (b, q, g, r)."""

    dy_bqgrk: Array
    lse_bqgr: Array
    delta_bqgr: Array


def _operands(q_bthk, k_btgk, v_btgk, segments_bt, plan) -> tuple[_Queries, _Keys]:
    batch, time, heads, size = q_bthk.shape
    groups = k_btgk.shape[2]
    index_t = places(time, plan)
    q_btgrk = q_bthk.reshape(batch, time, groups, heads // groups, size)
    return _Queries(q_btgrk, segments_bt, index_t), _Keys(k_btgk, v_btgk, segments_bt, index_t)


def _halves(tree: Any) -> tuple[Any, Any]:
    """The first and the second part of each leaf, along time: the last axis of an index, else the second."""
    half = lambda a, i: jnp.split(a, 2, axis=min(a.ndim - 1, 1))[i]  # noqa: E731
    first, second = (jax.tree.map(lambda a, i=i: half(a, i), tree) for i in range(2))
    return first, second


def _next(tree, plan):
    """What the rank before this one has."""
    return jax.tree.map(lambda a: plan.shift(a, "context", 1), tree)


def _visible(query_side, keys: _Keys, owner: Array, plan: Plan):
    """The two pairs of queries and keys that see each other, and whether the keys' rank is before this one: the first
    pair's queries are then the first part's, and both pairs' keys are the first part's."""
    ahead = owner < plan.index("context")
    (first, second), (k_first, k_second) = _halves(query_side), _halves(keys)
    return (_select(ahead, first, second), k_first), (second, _select(ahead, k_first, k_second)), ahead


def _select(condition: Array, then, otherwise):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)


def _merge(one: _Sums, other: _Sums) -> _Sums:
    """Attention over the keys of both."""
    lse_btgr = jnp.logaddexp(one.lse_btgr, other.lse_btgr)
    share = lambda sums: jnp.exp(sums.lse_btgr - lse_btgr)[..., None] * sums.y_btgrk  # noqa: E731
    return _Sums(share(one) + share(other), lse_btgr)


def _scores(queries: _Queries, keys: _Keys, options: _Options) -> tuple[Array, Array]:
    """Scores (b, g, r, q, s) float32, and whether (b, 1, 1, q, s) a query sees a key."""
    scores = jnp.einsum("bqgrk,bsgk->bgrqs", queries.q_bqgrk, keys.k_bsgk, preferred_element_type=jnp.float32)
    visible_bqs = queries.segments_bq[:, :, None] == keys.segments_bs[:, None, :]
    visible_bqs &= keys.index_s <= queries.index_q[:, None]
    if options.window is not None:
        visible_bqs &= keys.index_s > queries.index_q[:, None] - options.window
    return scores * options.scale, visible_bqs[:, None, None]


def _attend_block(queries: _Queries, keys: _Keys, *, options: _Options, blocked: bool) -> _Sums:
    def run(queries: _Queries) -> _Sums:
        scores_bgrqs, visible = _scores(queries, keys, options)
        exp_bgrqs, total_bgrq, _ = masked_exp(scores_bgrqs, visible)
        highest_bgrq = jnp.max(jnp.where(visible, scores_bgrqs, LOWEST / 2), -1)
        y_bqgrk = jnp.einsum(
            "bgrqs,bsgk->bqgrk", exp_bgrqs.astype(keys.v_bsgk.dtype), keys.v_bsgk, preferred_element_type=jnp.float32
        )
        seen = total_bgrq > 0
        lse_bgrq = jnp.where(seen, highest_bgrq + jnp.log(jnp.where(seen, total_bgrq, 1)), LOWEST)
        total_bqgr = jnp.moveaxis(jnp.where(seen, total_bgrq, 1), 3, 1)
        return _Sums(y_bqgrk / total_bqgr[..., None], jnp.moveaxis(lse_bgrq, 3, 1))

    return _by_blocks(run, queries, blocked)


def _pull_block(query_side: tuple[_Queries, _Given], keys: _Keys, *, options: _Options, blocked: bool):
    """Gradients of the queries (b, q, g, r, k) and of (keys, values), float32."""

    def run(query_side) -> tuple[Array, tuple[Array, Array]]:
        queries, given = query_side
        scores_bgrqs, visible = _scores(queries, keys, options)
        last = lambda a_bqgr: jnp.moveaxis(a_bqgr, 1, 3)[..., None]  # noqa: E731
        p_bgrqs = jnp.exp(jnp.where(visible, scores_bgrqs - last(given.lse_bqgr), -jnp.inf))
        dy_bqgrk = given.dy_bqgrk.astype(keys.v_bsgk.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv_bsgk = product("bgrqs,bqgrk->bsgk", p_bgrqs.astype(dy_bqgrk.dtype), dy_bqgrk)
        dp_bgrqs = product("bqgrk,bsgk->bgrqs", dy_bqgrk, keys.v_bsgk)
        ds_bgrqs = (p_bgrqs * (dp_bgrqs - last(given.delta_bqgr)) * options.scale).astype(keys.k_bsgk.dtype)
        dk_bsgk = product("bgrqs,bqgrk->bsgk", ds_bgrqs, queries.q_bqgrk)
        return product("bgrqs,bsgk->bqgrk", ds_bgrqs, keys.k_bsgk), (dk_bsgk, dv_bsgk)

    length = query_side[0].q_bqgrk.shape[1]
    if not blocked or length <= BLOCK:
        return run(query_side)

    def step(total, query_side):
        dq, dkv = run(query_side)
        return jax.tree.map(jnp.add, total, dkv), dq

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (keys.k_bsgk, keys.v_bsgk))
    total, dq = lax.scan(step, vary_like(zeros, (keys, query_side)), _in_blocks(query_side))
    return _from_blocks(dq, length), total


def _by_blocks(run, queries: _Queries, blocked: bool) -> _Sums:
    """`run`, on one block of queries at a time if `blocked`."""
    length = queries.q_bqgrk.shape[1]
    if not blocked or length <= BLOCK:
        return run(queries)
    _, sums = lax.scan(lambda _, queries: (None, run(queries)), None, _in_blocks(queries))
    return jax.tree.map(lambda a: _from_blocks(a, length), sums)


def _in_blocks(tree):
    """Each leaf in blocks along time, as a new first axis; the last is padded with zeros, whose cotangents are zero."""

    def split(a: Array) -> Array:
        axis = min(a.ndim - 1, 1)
        filled = jnp.pad(a, [(0, -a.shape[i] % BLOCK if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(filled.reshape(*a.shape[:axis], -1, BLOCK, *a.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(split, tree)


def _from_blocks(blocks: Array, length: int) -> Array:
    """The inverse of `_in_blocks` for an array (b, q, ...)."""
    joined = jnp.moveaxis(blocks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
