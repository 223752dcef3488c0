"""Attention with all scores at once.

Axes: b batch, t queries, s keys, h query heads, g key heads, r query heads per key head, k head size.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.attention.operands import Operands


class Grouped(NamedTuple):
    """Queries grouped by key head, so that keys and values are read in place instead of being repeated."""

    q_btgrk: Array
    k_bsgk: Array
    v_bsgk: Array
    visible_bts: Array
    sinks_gr: Array | None


def attention_reference(o: Operands, *, scale: float, window: int | None, name: str | None = "core") -> Array:
    """See `attention`: holds (b, h, t, s) scores, and saves the softmax's output, in v's dtype, for the gradient.

    name: the checkpoint name of that output for remat policies; None: it has no name.
    """
    batch, queries, heads, size = o.q_bthk.shape
    groups = o.k_bsgk.shape[2]
    visible_bts = o.segments_bt[:, :, None] == o.kv_segments_bs[:, None, :]
    visible_bts &= o.k_index[..., None, :] <= o.q_index[..., :, None]
    if window is not None:
        visible_bts &= o.k_index[..., None, :] > o.q_index[..., :, None] - window
    grouped = Grouped(
        q_btgrk=o.q_bthk.reshape(batch, queries, groups, heads // groups, size),
        k_bsgk=o.k_bsgk,
        v_bsgk=o.v_bsgk,
        visible_bts=visible_bts,
        sinks_gr=None if o.sinks_h is None else o.sinks_h.astype(jnp.float32).reshape(groups, -1),
    )
    y_btgrk: Any = _attend(scale, name, grouped)
    return y_btgrk.reshape(batch, queries, heads, -1)


# The gradient is written by hand, so that it saves one (t, s) array instead of seven.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, name: str | None, grouped: Grouped) -> Array:
    return _forward(scale, name, grouped)[0]


def _forward(scale, name, grouped):
    """The outputs, and the residuals: operands, probabilities of the keys and, if there are sinks, of the sinks."""
    q_btgrk, k_bsgk, v_bsgk, visible_bts, sinks_gr = grouped
    scores_bgrts = scale * jnp.einsum("btgrk,bsgk->bgrts", q_btgrk, k_bsgk, preferred_element_type=jnp.float32)
    sinks_gr11 = None if sinks_gr is None else sinks_gr[..., None, None]
    exp_bgrts, total_bgrt, maximum_bgrt1 = masked_exp(scores_bgrts, visible_bts[:, None, None], sinks_gr11)
    sink_bgrt = None if sinks_gr11 is None else jnp.exp(sinks_gr11 - maximum_bgrt1)[..., 0]
    total_bgrt = total_bgrt if sink_bgrt is None else total_bgrt + sink_bgrt
    inverse_bgrt = 1 / jnp.where(total_bgrt == 0.0, 1.0, total_bgrt)
    p_bgrts = (exp_bgrts * inverse_bgrt[..., None]).astype(v_bsgk.dtype)
    sink_bgrt = None if sink_bgrt is None else sink_bgrt * inverse_bgrt
    if name is not None:
        p_bgrts = checkpoint_name(p_bgrts, name)
    y_btgrk = jnp.einsum("bgrts,bsgk->btgrk", p_bgrts, v_bsgk, preferred_element_type=jnp.float32)
    return y_btgrk.astype(q_btgrk.dtype), (q_btgrk, k_bsgk, v_bsgk, p_bgrts, sink_bgrt)


def _backward(scale, name, saved, dy_btgrk):
    del name
    q_btgrk, k_bsgk, v_bsgk, p_bgrts, sink_bgrt = saved
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv_bsgk = product("bgrts,btgrk->bsgk", p_bgrts, dy_btgrk.astype(p_bgrts.dtype))
    dp_bgrts = product("btgrk,bsgk->bgrts", dy_btgrk, v_bsgk)
    # The normalisation's share of the gradient, summed over all keys that a query reads.
    delta_bgrt = product("bgrts,bgrts->bgrt", p_bgrts, dp_bgrts)
    ds_bgrts = (scale * p_bgrts * (dp_bgrts - delta_bgrt[..., None])).astype(k_bsgk.dtype)
    dq_btgrk = product("bgrts,bsgk->btgrk", ds_bgrts, k_bsgk)
    dk_bsgk = product("bgrts,btgrk->bsgk", ds_bgrts, q_btgrk)
    dsinks_gr = None if sink_bgrt is None else -jnp.einsum("bgrt,bgrt->gr", sink_bgrt, delta_bgrt)
    operands = q_btgrk, k_bsgk, v_bsgk
    dq, dk, dv = (d.astype(a.dtype) for d, a in zip((dq_btgrk, dk_bsgk, dv_bsgk), operands, strict=True))
    return (Grouped(dq, dk, dv, None, dsinks_gr),)  # pyright: ignore[reportArgumentType]


_attend.defvjp(_forward, _backward)


def masked_exp(scores: Array, visible: Array, sinks: Array | None = None) -> tuple[Array, Array, Array]:
    """exp(scores - m) where visible, else 0; its sum over the last axis; and m. The sum is 0 where nothing is visible.

    m is the maximum over the last axis, kept with size 1, and over `sinks`, which broadcast against it.
    """
    lowest = jnp.finfo(scores.dtype).min  # not -inf: the gradient of -inf minus -inf is NaN
    scores = jnp.where(visible, scores, lowest)
    # Half the lowest as a floor: it leaves maxima of real scores alone, and exp(lowest - lowest / 2) is 0.
    floor = lowest / 2 if sinks is None else jnp.maximum(sinks, lowest / 2)
    maximum = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), floor))
    exp = jnp.exp(scores - maximum)
    return exp, jnp.einsum("...s->...", exp), maximum
