"""Blocks of context attention in plain JAX, with every mask that attention has.

Letters: b batch, t queries of this rank or block, s keys, h query heads, g key heads, r query heads per key head,
k head size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.kernels.attention.reference import masked_exp
from orogen.model.context_ring import halves, rejoined
from orogen.model.context_sums import LOWEST, Given, Keys, Method, Queries, Sums, merge
from orogen.parallel.varying import vary_like

BLOCK = 64


def plain(*, window: int | None, scale: float, blocked: bool) -> Method:
    """The method without a kernel. blocked: at most BLOCK queries at a time, instead of all of a part."""
    attend = partial(_attend, window=window, scale=scale, blocked=blocked)
    pull = partial(_pull, window=window, scale=scale, blocked=blocked)

    def attend_own(queries: Queries, keys: Keys) -> Sums:
        (q_first, q_second), (k_first, k_second) = halves(queries), halves(keys)
        return rejoined(attend(q_first, k_first), merge(attend(q_second, k_first), attend(q_second, k_second)))

    def pull_own(query_side: tuple[Queries, Given], keys: Keys):
        (first, second), (k_first, k_second) = halves(query_side), halves(keys)
        (dq_a, d_a), (dq_b, d_b), (dq_c, d_c) = pull(first, k_first), pull(second, k_first), pull(second, k_second)
        return rejoined(dq_a, dq_b + dq_c), rejoined(jax.tree.map(jnp.add, d_a, d_b), d_c)

    return Method(
        attend_own,
        lambda one, other: (attend(*one), attend(*other)),
        pull_own,
        lambda one, other: (pull(*one), pull(*other)),
    )


def _scores(queries: Queries, keys: Keys, window: int | None, scale: float) -> tuple[Array, Array]:
    """Scores (b, g, r, t, s) float32, and whether (b, 1, 1, t, s) a query sees a key."""
    q_btgrk = _grouped(queries.q_bthk, keys)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q_btgrk, keys.k_bsgk, preferred_element_type=jnp.float32)
    visible_bts = queries.segments_bt[:, :, None] == keys.segments_bs[:, None, :]
    visible_bts &= keys.index_s <= queries.index_t[:, None]
    if window is not None:
        visible_bts &= keys.index_s > queries.index_t[:, None] - window
    return scores * scale, visible_bts[:, None, None]


def _grouped(a_bth: Array, keys: Keys) -> Array:
    """`a_bth` (b, t, h, ...) as (b, t, g, r, ...)."""
    batch, time, heads, *rest = a_bth.shape
    groups = keys.k_bsgk.shape[2]
    return a_bth.reshape(batch, time, groups, heads // groups, *rest)


def _attend(queries: Queries, keys: Keys, *, window: int | None, scale: float, blocked: bool) -> Sums:
    def run(queries: Queries) -> Sums:
        scores_bgrts, visible = _scores(queries, keys, window, scale)
        exp_bgrts, total_bgrt, _ = masked_exp(scores_bgrts, visible)
        highest_bgrt = jnp.max(jnp.where(visible, scores_bgrts, LOWEST / 2), -1)
        y_btgrk = jnp.einsum(
            "bgrts,bsgk->btgrk", exp_bgrts.astype(keys.v_bsgk.dtype), keys.v_bsgk, preferred_element_type=jnp.float32
        )
        seen = total_bgrt > 0
        lse_bgrt = jnp.where(seen, highest_bgrt + jnp.log(jnp.where(seen, total_bgrt, 1)), LOWEST)
        total_btgr = jnp.moveaxis(jnp.where(seen, total_bgrt, 1), 3, 1)
        shape = queries.q_bthk.shape[:3]
        y_bthk = (y_btgrk / total_btgr[..., None]).reshape(*shape, -1)
        return Sums(y_bthk, jnp.moveaxis(lse_bgrt, 3, 1).reshape(shape))

    length = queries.q_bthk.shape[1]
    if not blocked or length <= BLOCK:
        return run(queries)
    _, sums = lax.scan(lambda _, queries: (None, run(queries)), None, _in_blocks(queries))
    return jax.tree.map(lambda a: _from_blocks(a, length), sums)


def _pull(query_side: tuple[Queries, Given], keys: Keys, *, window: int | None, scale: float, blocked: bool):
    """Gradients of the queries (b, t, h, k) and of (keys, values), float32."""

    def run(query_side) -> tuple[Array, tuple[Array, Array]]:
        queries, given = query_side
        scores_bgrts, visible = _scores(queries, keys, window, scale)
        last = lambda a_bth: jnp.moveaxis(_grouped(a_bth, keys), 1, 3)[..., None]  # noqa: E731
        p_bgrts = jnp.exp(jnp.where(visible, scores_bgrts - last(given.lse_bth), -jnp.inf))
        q_btgrk, dy_btgrk = (_grouped(a, keys) for a in (queries.q_bthk, given.dy_bthk.astype(keys.v_bsgk.dtype)))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv_bsgk = product("bgrts,btgrk->bsgk", p_bgrts.astype(dy_btgrk.dtype), dy_btgrk)
        dp_bgrts = product("btgrk,bsgk->bgrts", dy_btgrk, keys.v_bsgk)
        ds_bgrts = (p_bgrts * (dp_bgrts - last(given.delta_bth)) * scale).astype(keys.k_bsgk.dtype)
        dk_bsgk = product("bgrts,btgrk->bsgk", ds_bgrts, q_btgrk)
        dq_btgrk = product("bgrts,bsgk->btgrk", ds_bgrts, keys.k_bsgk)
        return dq_btgrk.reshape(queries.q_bthk.shape), (dk_bsgk, dv_bsgk)

    length = query_side[0].q_bthk.shape[1]
    if not blocked or length <= BLOCK:
        return run(query_side)

    def step(total, query_side):
        dq, dkv = run(query_side)
        return jax.tree.map(jnp.add, total, dkv), dq

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (keys.k_bsgk, keys.v_bsgk))
    total, dq = lax.scan(step, vary_like(zeros, (keys, query_side)), _in_blocks(query_side))
    return _from_blocks(dq, length), total


def _in_blocks(tree):
    """Each leaf in blocks along time, as a new first axis; the last is padded with zeros, whose cotangents are zero."""

    def split(a: Array) -> Array:
        axis = min(a.ndim - 1, 1)
        filled = jnp.pad(a, [(0, -a.shape[i] % BLOCK if i == axis else 0) for i in range(a.ndim)])
        return jnp.moveaxis(filled.reshape(*a.shape[:axis], -1, BLOCK, *a.shape[axis + 1 :]), axis, 0)

    return jax.tree.map(split, tree)


def _from_blocks(blocks: Array, length: int) -> Array:
    """The inverse of `_in_blocks` for an array (b, t, ...)."""
    joined = jnp.moveaxis(blocks, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
