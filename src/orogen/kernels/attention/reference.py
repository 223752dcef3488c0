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
    sinks_h: Array | None,
    *,
    scale: float,
    window: int | None,
) -> Array:
    """See `attention`: holds (b, h, t, s) scores."""
    batch, queries, heads, size = q_bthk.shape
    groups = k_bsgk.shape[2]
    # Queries in groups, so that keys and values are read where they are instead of repeated.
    q_btgrk = q_bthk.reshape(batch, queries, groups, heads // groups, size)
    scores_bgrts = jnp.einsum("btgrk,bsgk->bgrts", q_btgrk, k_bsgk, preferred_element_type=jnp.float32) * scale
    visible_bts = segments_bt[:, :, None] == kv_segments_bs[:, None, :]
    visible_bts &= k_index_s <= q_index_t[:, None]
    if window is not None:
        visible_bts &= k_index_s > q_index_t[:, None] - window
    sinks_gr11 = None if sinks_h is None else sinks_h.astype(jnp.float32).reshape(groups, -1, 1, 1)
    exp_bgrts, total_bgrt = masked_exp(scores_bgrts, visible_bts[:, None, None], sinks_gr11)
    y_btgrk = jnp.einsum(
        "bgrts,bsgk->btgrk", exp_bgrts.astype(v_bsgk.dtype), v_bsgk, preferred_element_type=jnp.float32
    )
    # Divided last: k numbers a query instead of s.
    total_btgr = total_bgrt.transpose(0, 3, 1, 2)
    y_btgrk /= jnp.where(total_btgr == 0.0, 1.0, total_btgr)[..., None]
    return y_btgrk.reshape(batch, queries, heads, -1).astype(q_bthk.dtype)


def masked_exp(scores: Array, visible: Array, sinks: Array | None = None) -> tuple[Array, Array]:
    """exp(scores - m) where visible, else 0, and its sum over the last axis; all 0 where nothing is visible.

    m is the maximum over the last axis. `sinks` broadcasts against it, and takes part in maximum and sum alone.
    """
    lowest = jnp.finfo(scores.dtype).min  # not -inf: the gradient of -inf minus -inf is NaN
    scores = jnp.where(visible, scores, lowest)
    # Half the lowest as a floor: it leaves maxima of real scores alone, and exp(lowest - lowest / 2) is 0.
    floor = lowest / 2 if sinks is None else jnp.maximum(sinks, lowest / 2)
    maximum = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), floor))
    exp = jnp.exp(scores - maximum)
    total = jnp.einsum("...s->...", exp)
    return exp, total if sinks is None else total + jnp.exp(sinks - maximum)[..., 0]
