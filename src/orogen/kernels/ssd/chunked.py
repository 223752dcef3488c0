"""The Mamba-2 recurrence in chunks: matrix products inside a chunk, a recurrence over the chunks' states.

Axes: b batch, t time, h heads, p head size, g groups, r heads per group, n state, c chunks,
q position in a chunk, s position in the chunk that q reads from.

With l the sum of dt a since the chunk's start or the segment's, and S the state that enters the chunk,

    y_q = sum_{s<=q} (C_q . B_s) exp(l_q - l_s) dt_s x_s  +  exp(l_q) S C_q

where s runs over q's segment, and the second term exists in the chunk's first segment only.

The products with S, B and C run once per group, with all its heads side by side; C . B is computed once per group.
The gradient is written by hand, so that the (q, s) matrices, by far the largest arrays, are recomputed and not saved.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.recompute import from_inputs
from orogen.kernels.ssd import sums
from orogen.kernels.ssd.operands import Operands

LEAF = 8  # the least length of a part of a chunk, in tokens; parts of 2 LEAF tokens or more are halved


class Chunks(NamedTuple):
    """The operands in chunks, all float32; `dtx` is dt x, `runs` counts the segment changes in the chunk so far."""

    dtx_cbgqrp: Array
    log_decay_cbgrq: Array
    b_cbgsn: Array
    c_cbgqn: Array
    runs_cbq: Array
    initial_bgnrp: Array


class Decays(NamedTuple):
    """The decays of the entering state up to q (into) and to the chunk's end (whole), and of token s up to the chunk's
    end (out_of) and to q (pair). Zero across a change of segment.
    """

    into_cbgqr: Array
    out_of_cbgsr: Array
    whole_cbgr: Array
    pair_cbgrqs: Array


class Kept(NamedTuple):
    """What the forward pass saves for the gradient: what the entering states add to y, and the states themselves."""

    entering_cbgqrp: Array
    states_cbgnrp: Array


def ssd_chunked(o: Operands, *, chunk_size: int) -> tuple[Array, Array]:
    """`ssd` by chunks of `chunk_size` tokens, rounded up to a number that halves evenly down to LEAF.

    The last chunk is padded with steps of length zero. Differentiable once, in reverse mode only.
    """
    batch, time, heads, head_size = o.x_bthp.shape
    width = _halvable(min(chunk_size, time))
    # The skip is added last and by itself: its gradient needs only x and D, which are saved anyway.
    outputs: Any = _ssd(width, o._replace(dt_bth=o.dt_bth.astype(jnp.float32), skip_h=None))
    y_cbgqrp, final_bgnrp = outputs
    y_bthp = jnp.transpose(y_cbgqrp, (1, 0, 3, 2, 4, 5)).reshape(batch, -1, heads, head_size)[:, :time]
    skip = lambda y, x, skip_h: (y + skip_h[:, None] * x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    y_bthp = from_inputs(skip)(y_bthp, o.x_bthp, o.skip_h)
    return y_bthp, jnp.moveaxis(final_bgnrp, 2, 4).reshape(o.initial_state_bhpn.shape)


def _halvable(tokens: int) -> int:
    """The least number >= `tokens` that is below 2 LEAF, or LEAF to 2 LEAF - 1 times a power of two."""
    unit = 2 ** max(0, math.floor(math.log2(tokens / LEAF)))
    return -(-tokens // unit) * unit


def _chunks(width: int, o: Operands) -> Chunks:
    """The operands of `ssd`, except the skip, in chunks of `width` tokens."""
    (batch, _, heads, head_size), (groups, state) = o.x_bthp.shape, o.b_btgn.shape[2:]
    per_group = heads // groups
    dtx_bthp = o.dt_bth[..., None] * o.x_bthp.astype(jnp.float32)
    dtx_bcqgrp = sums.in_chunks(dtx_bthp, width).reshape(batch, -1, width, groups, per_group, head_size)
    log_decay_bcqh = sums.in_chunks(sums.log_decays(o.dt_bth, o.a_h), width)
    log_decay_bcqgr = log_decay_bcqh.reshape(batch, -1, width, groups, per_group)
    initial_bgrpn = o.initial_state_bhpn.reshape(batch, groups, per_group, head_size, state)
    return Chunks(
        dtx_cbgqrp=jnp.transpose(dtx_bcqgrp, (1, 0, 3, 2, 4, 5)),
        log_decay_cbgrq=jnp.transpose(log_decay_bcqgr, (1, 0, 3, 4, 2)),
        b_cbgsn=jnp.transpose(sums.in_chunks(o.b_btgn.astype(jnp.float32), width), (1, 0, 3, 2, 4)),
        c_cbgqn=jnp.transpose(sums.in_chunks(o.c_btgn.astype(jnp.float32), width), (1, 0, 3, 2, 4)),
        runs_cbq=jnp.moveaxis(sums.runs_in_chunks(o.segments_bt, width), 1, 0),
        initial_bgnrp=jnp.moveaxis(initial_bgrpn, 4, 2),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(width: int, o: Operands) -> tuple[Array, Array]:
    """Outputs (c, b, g, q, r, p) and final state (b, g, n, r, p)."""
    return _forward(_chunks(width, o))[0]


def _ssd_forward(width: int, o: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Kept]]:
    """The outputs, and what `_ssd_backward` needs: the operands, in their own dtype and not in chunks, and `Kept`."""
    outputs, kept = _forward(_chunks(width, o))
    return outputs, (o, kept)


def _ssd_backward(width: int, saved: tuple[Operands, Kept], gradients: tuple[Array, Array]) -> tuple[Operands]:
    o, kept = saved
    chunks, back = jax.vjp(partial(_chunks, width), o)
    (gradient,) = back(_backward(chunks, kept, gradients))
    return (gradient._replace(segments_bt=None),)


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _forward(chunks: Chunks) -> tuple[tuple[Array, Array], Kept]:
    """The outputs, and what `_backward` needs besides the chunks."""
    decays = _decays(chunks)
    leaving_cbgsrp = chunks.dtx_cbgqrp * decays.out_of_cbgsr[..., None]
    added_cbgnrp = jnp.einsum("cbgsn,cbgsrp->cbgnrp", chunks.b_cbgsn, leaving_cbgsrp)

    def pass_on(state_bgnrp: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        whole_bgr, added_bgnrp = chunk
        return whole_bgr[:, :, None, :, None] * state_bgnrp + added_bgnrp, state_bgnrp

    final_bgnrp, states_cbgnrp = lax.scan(pass_on, chunks.initial_bgnrp, (decays.whole_cbgr, added_cbgnrp))
    states_cbgnrp = checkpoint_name(states_cbgnrp, "ssd_states")

    weights_cbgrqs = _scores(chunks)[:, :, :, None] * decays.pair_cbgrqs
    dtx_cbgrsp = jnp.moveaxis(chunks.dtx_cbgqrp, 4, 3)
    within_cbgrqp = jnp.einsum("cbgrqs,cbgrsp->cbgrqp", weights_cbgrqs, dtx_cbgrsp)
    entering_cbgqrp = jnp.einsum("cbgqn,cbgnrp->cbgqrp", chunks.c_cbgqn, states_cbgnrp)
    entering_cbgqrp = checkpoint_name(entering_cbgqrp * decays.into_cbgqr[..., None], "ssd")
    others_cbgqrp = checkpoint_name(jnp.moveaxis(within_cbgrqp, 3, 4) + entering_cbgqrp, "ssd")
    y_cbgqrp = others_cbgqrp + _own_scores(chunks) * chunks.dtx_cbgqrp
    return (y_cbgqrp, final_bgnrp), Kept(entering_cbgqrp, states_cbgnrp)


def _backward(chunks: Chunks, kept: Kept, gradients: tuple[Array, Array]) -> Chunks:
    """The gradient of every operand, from the gradients `dy` of the outputs and `dfinal` of the final state.

    The log decay of token u is in the exponent of every term that passes over u: from an earlier token or the entering
    state, to u, to a later token or to the leaving state. So its gradient is the sum of those terms. A token's
    contribution to its own output does not decay and is left out.
    """
    dy_cbgqrp, dfinal_bgnrp = gradients
    dtx_cbgsrp, b_cbgsn, c_cbgqn = chunks.dtx_cbgqrp, chunks.b_cbgsn, chunks.c_cbgqn
    decays = _decays(chunks)

    decayed_dy_cbgqrp = dy_cbgqrp * decays.into_cbgqr[..., None]
    dc_cbgqn = jnp.einsum("cbgqrp,cbgnrp->cbgqn", decayed_dy_cbgqrp, kept.states_cbgnrp)
    read_cbgnrp = jnp.einsum("cbgqn,cbgqrp->cbgnrp", c_cbgqn, decayed_dy_cbgqrp)
    dinitial_bgnrp, dadded_cbgnrp, dwhole_cbgr = _backward_states(decays, read_cbgnrp, kept, dfinal_bgnrp)
    out_of_cbgsr1 = decays.out_of_cbgsr[..., None]
    db_cbgsn = jnp.einsum("cbgsrp,cbgnrp->cbgsn", dtx_cbgsrp * out_of_cbgsr1, dadded_cbgnrp)
    leaving_cbgsrp = jnp.einsum("cbgsn,cbgnrp->cbgsrp", b_cbgsn, dadded_cbgnrp) * out_of_cbgsr1

    dy_cbgrqp, dtx_cbgrsp = jnp.moveaxis(dy_cbgqrp, 4, 3), jnp.moveaxis(dtx_cbgsrp, 4, 3)
    dweights_cbgrqs = jnp.einsum("cbgrqp,cbgrsp->cbgrqs", dy_cbgrqp, dtx_cbgrsp)
    scores_cbg1qs = _scores(chunks)[:, :, :, None]
    weights_cbgrqs = scores_cbg1qs * decays.pair_cbgrqs
    within_cbgsrp = jnp.moveaxis(jnp.einsum("cbgrqs,cbgrqp->cbgrsp", weights_cbgrqs, dy_cbgrqp), 3, 4)
    dweights_cbgrqs *= decays.pair_cbgrqs
    dscores_cbgqs = jnp.sum(dweights_cbgrqs, axis=3)
    dc_cbgqn += jnp.einsum("cbgqs,cbgsn->cbgqn", dscores_cbgqs, b_cbgsn)
    db_cbgsn += jnp.einsum("cbgqs,cbgqn->cbgsn", dscores_cbgqs, c_cbgqn)

    read_cbgqr = jnp.sum(dy_cbgqrp * kept.entering_cbgqrp, axis=-1)
    left_cbgsr = jnp.sum(dtx_cbgsrp * leaving_cbgsrp, axis=-1)
    far_cbgrq = sums.across_tokens(jnp.swapaxes(read_cbgqr, 3, 4), jnp.swapaxes(left_cbgsr, 3, 4), dwhole_cbgr)
    return Chunks(
        dtx_cbgqrp=within_cbgsrp + leaving_cbgsrp + _own_scores(chunks) * dy_cbgqrp,
        log_decay_cbgrq=far_cbgrq + _across_pairs(dweights_cbgrqs * scores_cbg1qs),
        b_cbgsn=db_cbgsn,
        c_cbgqn=dc_cbgqn,
        runs_cbq=jnp.zeros_like(chunks.runs_cbq),
        initial_bgnrp=dinitial_bgnrp,
    )


def _across_pairs(pairs_cbgrqs: Array) -> Array:
    """For each token u of a chunk, the sum of the pairs with s < u <= q. (c, b, g, r, u)

    By recursive halving: the pairs from the first half to the second pass over every u between them, and each half is
    halved again for the pairs inside it. So each sum adds only its own terms. A running sum of what tokens receive
    minus what they give would lose to cancellation the little that passes over a strong decay.
    """
    *outer, width, _ = pairs_cbgrqs.shape
    passing_u, parts_qs = jnp.zeros((*outer, width), jnp.float32), pairs_cbgrqs[..., None, :, :]
    while (half := parts_qs.shape[-1] // 2) >= LEAF:
        between_qs = parts_qs[..., half:, :half]
        first_u = sums.masked_sum(jnp.tri(half, k=-1), "us,...s->...u", jnp.sum(between_qs, axis=-2))
        second_u = sums.masked_sum(jnp.tri(half), "qu,...q->...u", jnp.sum(between_qs, axis=-1))
        passing_u += jnp.concatenate([first_u, second_u], axis=-1).reshape(*outer, width)
        halves = [parts_qs[..., :half, :half], parts_qs[..., half:, half:]]
        parts_qs = jnp.stack(halves, axis=-3).reshape(*outer, -1, half, half)
    q, s, u = jnp.ogrid[(slice(parts_qs.shape[-1]),) * 3]
    return passing_u + sums.masked_sum((s < u) & (u <= q), "qsu,...qs->...u", parts_qs).reshape(*outer, width)


def _backward_states(decays: Decays, read_cbgnrp: Array, kept: Kept, dfinal_bgnrp: Array) -> tuple[Array, Array, Array]:
    """Gradients of the initial state, of what each chunk adds to the state, and of the log of each chunk's whole decay.

    `read_cbgnrp` is the gradient of each entering state from the outputs of its chunk.
    """

    def pass_back(dleft_bgnrp: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        whole_bgr, read_bgnrp, entered_bgnrp = chunk
        through_bgnrp = whole_bgr[:, :, None, :, None] * dleft_bgnrp
        return through_bgnrp + read_bgnrp, (dleft_bgnrp, jnp.sum(through_bgnrp * entered_bgnrp, axis=(2, 4)))

    chunks = (decays.whole_cbgr, read_cbgnrp, kept.states_cbgnrp)
    dinitial_bgnrp, (dadded_cbgnrp, dwhole_cbgr) = lax.scan(pass_back, dfinal_bgnrp, chunks, reverse=True)
    return dinitial_bgnrp, dadded_cbgnrp, dwhole_cbgr


def _decays(chunks: Chunks) -> Decays:
    """Every decay of a chunk."""
    runs_cbq, readable_cbqs = chunks.runs_cbq, sums.readable(chunks.runs_cbq)
    coarse_cbgrq, fine_cbgrq = (
        sums.masked_sum(readable_cbqs, "cbqs,cbgrs->cbgrq", part)
        for part in sums.in_two(chunks.log_decay_cbgrq, lowest=sums.LOWEST_LOG_DECAY, terms=runs_cbq.shape[-1])
    )
    lasting_cbs = runs_cbq == runs_cbq[..., -1:]
    into_cbgrq = _exp_where((runs_cbq == 0)[:, :, None, None], coarse_cbgrq + fine_cbgrq)
    between = lambda q, s: (coarse_cbgrq[q] - coarse_cbgrq[s]) + (fine_cbgrq[q] - fine_cbgrq[s])  # noqa: E731
    each, row, column, last = ..., (..., slice(None), None), (..., None, slice(None)), (..., slice(-1, None))
    return Decays(
        into_cbgqr=jnp.swapaxes(into_cbgrq, 3, 4),
        out_of_cbgsr=jnp.swapaxes(_exp_where(lasting_cbs[:, :, None, None], between(last, each)), 3, 4),
        whole_cbgr=into_cbgrq[..., -1],
        pair_cbgrqs=_exp_where(readable_cbqs[:, :, None, None], between(row, column)),
    )


def _scores(chunks: Chunks) -> Array:
    """C_q . B_s for s before q, else 0. (c, b, g, q, s)"""
    scores_cbgqs = jnp.einsum("cbgqn,cbgsn->cbgqs", chunks.c_cbgqn, chunks.b_cbgsn)
    return jnp.where(jnp.tri(scores_cbgqs.shape[-1], k=-1, dtype=bool), scores_cbgqs, 0.0)


def _own_scores(chunks: Chunks) -> Array:
    """C_q . B_q. (c, b, g, q, 1, 1)"""
    return jnp.sum(chunks.c_cbgqn * chunks.b_cbgsn, axis=-1)[..., None, None]


def _exp_where(mask: Array, exponent: Array) -> Array:
    """exp(exponent), 0 where masked out; masked before exp, which overflows on the pairs that must not be read."""
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))
