"""Attention with all scores at once.

Axes: b batch, t queries, s keys, h query heads, g key heads, r query heads of a key head, k head size.
"""

import jax
from jax import Array
from jax import numpy as jnp


def attention_full(
    q_bthk: Array,
    k_bsgk: Array,
    v_bsgk: Array,
    segments_bt: Array,
    kv_segments_bs: Array,
    q_index_t: Array,
    k_index_s: Array,
    *,
    scale: float,
) -> Array:
    """See `attention`: holds (b, h, t, s) scores."""
    batch, queries, heads, size = q_bthk.shape
    groups = k_bsgk.shape[2]
    # Queries in groups, so that keys and values are read where they are instead of repeated.
    q_btgrk = q_bthk.reshape(batch, queries, groups, heads // groups, size)
    scores_bgrts = jnp.einsum("btgrk,bsgk->bgrts", q_btgrk, k_bsgk, preferred_element_type=jnp.float32) * scale
    visible_bts = segments_bt[:, :, None] == kv_segments_bs[:, None, :]
    visible_bts &= k_index_s <= q_index_t[:, None]
    exp_bgrts = masked_exp(scores_bgrts, visible_bts[:, None, None])
    y_btgrk = jnp.einsum(
        "bgrts,bsgk->btgrk", exp_bgrts.astype(v_bsgk.dtype), v_bsgk, preferred_element_type=jnp.float32
    )
    # Divided last: k numbers a query instead of s.
    total_btgr = jnp.einsum("bgrts->btgr", exp_bgrts)
    y_btgrk /= jnp.where(total_btgr == 0.0, 1.0, total_btgr)[..., None]
    return y_btgrk.reshape(batch, queries, heads, -1).astype(q_bthk.dtype)


def masked_exp(scores: Array, visible: Array) -> Array:
    """exp(scores - their maximum over the last axis) where visible, else 0; all 0 where nothing is."""
    lowest = jnp.finfo(scores.dtype).min  # not -inf: the gradient of -inf minus -inf is NaN
    scores = jnp.where(visible, scores, lowest)
    # Half the lowest as a floor: it leaves maxima of real scores alone, and exp(lowest - lowest / 2) is 0.
    maximum = jnp.maximum(jax.lax.stop_gradient(scores).max(-1, keepdims=True), lowest / 2)
    return jnp.exp(scores - maximum)
