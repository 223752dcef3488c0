"""Replay of all new tokens at once, from the checkpoint and the inputs since then: one pass over the state.

Axes: b batch, l entries of the ring, t new tokens, u new tokens that t reads, h heads, p head size, g groups, r heads
per group, n state.

With Λ(s,t] the decay of all tokens after s up to t,

    y_t = Λ(0,t] S C_t  +  sum_{s<=t} (C_t . B_s) Λ(s,t] dt_s x_s  +  D x_t

where s runs over ring and piece. Each exponent is the sum of the log decays in between, all of one sign, never the
difference of two sums: its relative error is that of float32 however strong the decays are.
"""

import functools

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.replay.operands import FlushOperands, Operands, Ring, used, written
from orogen.kernels.state_update.reference import rounded


def replay_parallel(o: Operands) -> tuple[Array, Ring]:
    """See `replay`."""
    batch, tokens, heads, size = o.piece.x_blhp.shape
    groups = o.c_btgn.shape[2]
    inputs = jax.tree.map(lambda a: a.astype(jnp.float32), (used(o.ring, o.cursor_b), o.piece, o.c_btgn))
    ring, piece, c_btgn = inputs
    by_group = functools.partial(_by_group, groups=groups)
    log_blh, log_bth = ring.dt_blh * o.a_h, piece.dt_blh * o.a_h
    token_t = jnp.arange(tokens)
    # Sums of log decays: over the ring's tokens after l, the piece's up to t, and the piece's after u up to t.
    after_blh = _after(log_blh)
    upto_bth = jnp.einsum("tu,buh->bth", (token_t[:, None] >= token_t).astype(jnp.float32), log_bth)
    between_tuv = (token_t[:, None] < token_t) & (token_t[:, None, None] >= token_t)
    between_btuh = jnp.einsum("tuv,bvh->btuh", between_tuv.astype(jnp.float32), log_bth)
    decay_btlh = jnp.exp(upto_bth[:, :, None] + after_blh[:, None])
    decay_btuh = jnp.where((token_t[:, None] >= token_t)[..., None], jnp.exp(between_btuh), 0)
    state_bgrpn = by_group(o.state_bhpn.astype(jnp.float32), 1)
    kept_bthp = jnp.einsum("bgrpn,btgn->btgrp", state_bgrpn, c_btgn).reshape(piece.x_blhp.shape)
    kept_bthp *= jnp.exp(upto_bth + log_blh.sum(1)[:, None])[..., None]
    y_btgrp = by_group(kept_bthp + o.skip_h[:, None] * piece.x_blhp, 2)
    for source, decay_btsh in ((ring, decay_btlh), (piece, decay_btuh)):
        weight_btsgr = by_group(decay_btsh * source.dt_blh[:, None], 3)
        scores_btsg = jnp.einsum("btgn,bsgn->btsg", c_btgn, source.b_blgn)
        y_btgrp += jnp.einsum("btsgr,bsgrp->btgrp", weight_btsgr * scores_btsg[..., None], by_group(source.x_blhp, 2))
    y_bthp = y_btgrp.reshape(batch, tokens, heads, size).astype(o.piece.x_blhp.dtype)
    y_bthp = jnp.where(o.active_b[:, None, None, None], y_bthp, 0)
    return y_bthp, written(o.ring, o.cursor_b, o.piece, o.active_b)


def flush_parallel(o: FlushOperands) -> Array:
    """See `flush`: Λ(0,l] S + sum_s Λ(s,l] dt_s x_s (outer) B_s, where l is the last entry used."""
    ring = jax.tree.map(lambda a: a.astype(jnp.float32), used(o.ring, o.cursor_b))
    groups = ring.b_blgn.shape[2]
    log_blh = ring.dt_blh * o.a_h
    given_blhp = (jnp.exp(_after(log_blh)) * ring.dt_blh)[..., None] * ring.x_blhp
    given_bgrpn = jnp.einsum("blgrp,blgn->bgrpn", _by_group(given_blhp, 2, groups=groups), ring.b_blgn)
    decay_bh11 = jnp.exp(log_blh.sum(1))[..., None, None]
    state_bhpn = decay_bh11 * o.state_bhpn.astype(jnp.float32) + given_bgrpn.reshape(o.state_bhpn.shape)
    moved_b = (o.flush_b & (o.cursor_b > 0))[:, None, None, None]
    return jnp.where(moved_b, rounded(state_bhpn, o.seeds_b2), o.state_bhpn)


def _after(log_blh: Array) -> Array:
    """The sum of the log decays of the ring's tokens after l. (b, l, h)"""
    entry_l = jnp.arange(log_blh.shape[1])
    return jnp.einsum("lm,bmh->blh", (entry_l[:, None] < entry_l).astype(jnp.float32), log_blh)


def _by_group(array_h: Array, axis: int, *, groups: int) -> Array:
    """Splits the axis of heads into groups and heads per group."""
    return array_h.reshape(*array_h.shape[:axis], groups, -1, *array_h.shape[axis + 1 :])
