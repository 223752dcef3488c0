"""Replay of all new tokens at once, from the checkpoint and the inputs since then: one pass over the state.

Axes: b batch, l places of the ring, t new tokens, u new tokens that t reads, h heads, p head size, g groups, r heads of
a group, n state.

With Λ(s,t] the decay of all tokens after s up to t,

    y_t = Λ(0,t] S C_t  +  sum_{s<=t} (C_t . B_s) Λ(s,t] dt_s x_s  +  D x_t

over the s of ring and piece. An exponent is a sum of log decays, all of one sign, of the tokens between, never the
difference of two sums: it is right to float32's relative error however strong the decays are.
"""

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.replay.operands import Operands, Ring, used, written


def replay_parallel(o: Operands) -> tuple[Array, Ring]:
    """See `replay`."""
    batch, tokens, heads, size = o.piece.x_blhp.shape
    groups = o.c_btgn.shape[2]
    inputs = jax.tree.map(lambda a: a.astype(jnp.float32), (used(o.ring, o.cursor_b), o.piece, o.c_btgn))
    ring, piece, c_btgn = inputs
    by_group = lambda a_h, axis: a_h.reshape(*a_h.shape[:axis], groups, -1, *a_h.shape[axis + 1 :])  # noqa: E731
    log_blh, log_bth = ring.dt_blh * o.a_h, piece.dt_blh * o.a_h
    place_l, token_t = jnp.arange(log_blh.shape[1]), jnp.arange(tokens)
    # Sums over the tokens after l of the ring, over those of the piece up to t, and over those after u up to t.
    after_blh = jnp.einsum("lm,bmh->blh", (place_l[:, None] < place_l).astype(jnp.float32), log_blh)
    upto_bth = jnp.einsum("tu,buh->bth", (token_t[:, None] >= token_t).astype(jnp.float32), log_bth)
    between_tuv = (token_t[:, None] < token_t) & (token_t[:, None, None] >= token_t)
    between_btuh = jnp.einsum("tuv,bvh->btuh", between_tuv.astype(jnp.float32), log_bth)
    decay_btlh = jnp.exp(upto_bth[:, :, None] + after_blh[:, None])
    decay_btuh = jnp.where((token_t[:, None] >= token_t)[..., None], jnp.exp(between_btuh), 0)
    kept_bthp = _from_state(o, c_btgn, by_group) * jnp.exp(upto_bth + log_blh.sum(1)[:, None])[..., None]
    y_btgrp = by_group(kept_bthp + o.skip_h[:, None] * piece.x_blhp, 2)
    for source, decay_btsh in ((ring, decay_btlh), (piece, decay_btuh)):
        weight_btsgr = by_group(decay_btsh * source.dt_blh[:, None], 3)
        scores_btsg = jnp.einsum("btgn,bsgn->btsg", c_btgn, source.b_blgn)
        y_btgrp += jnp.einsum("btsgr,bsgrp->btgrp", weight_btsgr * scores_btsg[..., None], by_group(source.x_blhp, 2))
    y_bthp = y_btgrp.reshape(batch, tokens, heads, size).astype(o.piece.x_blhp.dtype)
    y_bthp = jnp.where(o.active_b[:, None, None, None], y_bthp, 0)
    return y_bthp, written(o.ring, o.cursor_b, o.piece, o.active_b)


def _from_state(o: Operands, c_btgn: Array, by_group) -> Array:
    """S C_t, without its decay. (b, t, h, p)"""
    state_bgrpn = by_group(o.state_bhpn.astype(jnp.float32), 1)
    return jnp.einsum("bgrpn,btgn->btgrp", state_bgrpn, c_btgn).reshape(o.piece.x_blhp.shape)
