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
    weights_bgrts = masked_softmax(scores_bgrts, visible_bts[:, None, None])
    y_btgrk = jnp.einsum(
        "bgrts,bsgk->btgrk", weights_bgrts.astype(v_bsgk.dtype), v_bsgk, preferred_element_type=jnp.float32
    )
    return y_btgrk.reshape(batch, queries, heads, -1).astype(q_bthk.dtype)


def masked_softmax(scores: Array, visible: Array) -> Array:
    """Softmax over the last axis where visible, 0 elsewhere; all zeros where nothing is, and no NaN in its gradient."""
    lowest = jnp.finfo(scores.dtype).min  # not -inf: a row of those has no maximum to subtract
    scores = jnp.where(visible, scores, lowest)
    exponentials = jnp.where(visible, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    # A row that sees a key sums to at least 1.
    return exponentials / jnp.maximum(exponentials.sum(-1, keepdims=True), 1.0)
