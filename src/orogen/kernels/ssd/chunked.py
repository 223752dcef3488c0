"""The Mamba-2 recurrence in chunks: matrix products inside a chunk, a recurrence over the chunks' states.

Axes: b batch, t time, h heads, p head size, g groups, r heads of a group, n state, c chunks,
q position in a chunk, s position in the chunk that q reads from.

With l the sum of dt a since the chunk's start or the segment's, and S the state that enters the chunk,

    y_q = sum_{s<=q} (C_q . B_s) exp(l_q - l_s) dt_s x_s  +  exp(l_q) S C_q

over the s of q's segment, the second term in the chunk's first segment only.

The products with S, B and C run once a group, all its heads side by side; C . B is computed once a group.
The gradient is written out, so that the (q, s) matrices, the largest arrays by far, are made anew and not kept.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.remade import from_inputs

# exp of anything lower is not a normal float32. Cutting here bounds the sums over a chunk.
LOWEST_LOG_DECAY = -88.0
LEAF = 8  # tokens of a part of a chunk that is not cut in halves, at most twice as many less one


class Chunks(NamedTuple):
    """The operands cut in chunks, all float32; `dtx` is dt x, `runs` counts the segment changes in the chunk so far."""

    dtx_cbgqrp: Array
    log_decay_cbgrq: Array
    b_cbgsn: Array
    c_cbgqn: Array
    runs_cbq: Array
    initial_bgnrp: Array


class Decays(NamedTuple):
    """What is left of the entering state at q, of token s at the chunk's end, of token s at q; 0 across a change."""

    into_cbgqr: Array
    out_of_cbgsr: Array
    whole_cbgr: Array
    pair_cbgrqs: Array


class Kept(NamedTuple):
    """What the gradient needs of the forward pass: the part of y that comes from the entering states, and these."""

    entering_cbgqrp: Array
    states_cbgnrp: Array


def ssd_chunked(
    x_bthp: Array,
    dt_bth: Array,
    a_h: Array,
    b_btgn: Array,
    c_btgn: Array,
    segments_bt: Array,
    initial_state_bhpn: Array,
    skip_h: Array,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """`ssd` by chunks of `chunk_size` tokens, or the next number that can be cut in halves; the last is filled up with
    steps of length zero.

    Differentiable in reverse mode only, once.
    """
    batch, time, heads, head_size = x_bthp.shape
    operands = x_bthp, dt_bth.astype(jnp.float32), a_h, b_btgn, c_btgn, segments_bt, initial_state_bhpn
    width = _halvable(min(chunk_size, time))
    outputs: Any = _ssd(width, operands)
    y_cbgqrp, final_bgnrp = outputs
    y_bthp = jnp.transpose(y_cbgqrp, (1, 0, 3, 2, 4, 5)).reshape(batch, -1, heads, head_size)[:, :time]
    skip = lambda y, x, skip_h: (y + skip_h[:, None] * x.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    return from_inputs(skip)(y_bthp, x_bthp, skip_h), jnp.moveaxis(final_bgnrp, 2, 4).reshape(initial_state_bhpn.shape)


def _halvable(tokens: int) -> int:
    """The least number from `tokens` on that is LEAF to 2 LEAF - 1 times a power of two, or below 2 LEAF."""
    unit = 2 ** max(0, math.floor(math.log2(tokens / LEAF)))
    return -(-tokens // unit) * unit


def _chunks(width: int, operands: tuple[Array, ...]) -> Chunks:
    """The operands of `ssd` in chunks of `width` tokens."""
    x_bthp, dt_bth, a_h, b_btgn, c_btgn, segments_bt, initial_state_bhpn = operands
    (batch, _, heads, head_size), (groups, state) = x_bthp.shape, b_btgn.shape[2:]
    share = heads // groups
    log_decay_bth = jnp.maximum(dt_bth * a_h.astype(jnp.float32), LOWEST_LOG_DECAY)
    dtx_bthp = dt_bth[..., None] * x_bthp.astype(jnp.float32)
    changes_bt = (segments_bt[:, 1:] != segments_bt[:, :-1]).astype(jnp.float32)
    # A row's first token continues the initial state, so it never counts as a change.
    changes_bt = jnp.pad(changes_bt, ((0, 0), (1, 0)))
    dtx_bcqgrp = _cut(dtx_bthp, width).reshape(batch, -1, width, groups, share, head_size)
    log_decay_bcqgr = _cut(log_decay_bth, width).reshape(batch, -1, width, groups, share)
    initial_bgrpn = initial_state_bhpn.reshape(batch, groups, share, head_size, state)
    return Chunks(
        dtx_cbgqrp=jnp.transpose(dtx_bcqgrp, (1, 0, 3, 2, 4, 5)),
        log_decay_cbgrq=jnp.transpose(log_decay_bcqgr, (1, 0, 3, 4, 2)),
        b_cbgsn=jnp.transpose(_cut(b_btgn.astype(jnp.float32), width), (1, 0, 3, 2, 4)),
        c_cbgqn=jnp.transpose(_cut(c_btgn.astype(jnp.float32), width), (1, 0, 3, 2, 4)),
        runs_cbq=_counts(jnp.moveaxis(_cut(changes_bt, width), 1, 0)),
        initial_bgnrp=jnp.moveaxis(initial_bgrpn, 4, 2),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(width: int, operands: tuple[Array, ...]) -> tuple[Array, Array]:
    """Outputs (c, b, g, q, r, p) and final state (b, g, n, r, p)."""
    return _forward(_chunks(width, operands))[0]


def _ssd_forward(width: int, operands: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Any, Kept]]:
    """The outputs, and what `_ssd_backward` needs: the operands in their own dtype, and not in chunks."""
    outputs, kept = _forward(_chunks(width, operands))
    return outputs, (operands, kept)


def _ssd_backward(width: int, saved: tuple[Any, Kept], gradients: tuple[Array, Array]) -> tuple[Any]:
    (*inputs, segments_bt, initial_bhpn), kept = saved

    def cut(*differentiated: Array) -> Chunks:
        return _chunks(width, (*differentiated[:-1], segments_bt, differentiated[-1]))

    chunks, back = jax.vjp(cut, *inputs, initial_bhpn)
    *grads, grad_initial_bhpn = back(_backward(chunks, kept, gradients))
    return ((*grads, None, grad_initial_bhpn),)


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _forward(chunks: Chunks) -> tuple[tuple[Array, Array], Kept]:
    """The outputs, and what `_backward` needs beside the chunks."""
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

    The log decay of token u stands in the exponent of all that passes over u, from a token or state before it to a
    token from u on or to the leaving state. So its gradient is the sum of those products. A token's share of its own
    output does not decay, and stays out.
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
    far_cbgrq = _across_tokens(jnp.swapaxes(read_cbgqr, 3, 4), jnp.swapaxes(left_cbgsr, 3, 4), dwhole_cbgr)
    return Chunks(
        dtx_cbgqrp=within_cbgsrp + leaving_cbgsrp + _own_scores(chunks) * dy_cbgqrp,
        log_decay_cbgrq=far_cbgrq + _across_pairs(dweights_cbgrqs * scores_cbg1qs),
        b_cbgsn=db_cbgsn,
        c_cbgqn=dc_cbgqn,
        runs_cbq=jnp.zeros_like(chunks.runs_cbq),
        initial_bgnrp=dinitial_bgnrp,
    )


def _across_tokens(read_q: Array, left_s: Array, dwhole: Array) -> Array:
    """The gradient of each token's log decay (..., u) from what passes over it on the way from or to a state: `read`
    (..., q) by the tokens from it on, `left` (..., s) by those before it, and what goes through the whole chunk."""
    width = read_q.shape[-1]
    read_u = _sum(jnp.tri(width), "qu,...q->...u", read_q)
    left_u = _sum(jnp.tri(width, k=-1), "us,...s->...u", left_s)
    return read_u + left_u + dwhole[..., None]


def _across_pairs(pairs_cbgrqs: Array) -> Array:
    """For each token u of a chunk, the sum of the pairs that have s before u, and q at u or later. (c, b, g, r, u)

    By halves: the pairs from the first half to the second pass over each u between them, and those inside a half are
    cut in halves again. So every sum has terms of its own alone, where a running sum of what tokens receive less what
    they give would cancel down to the little that passes over a strong decay.
    """
    *outer, width, _ = pairs_cbgrqs.shape
    passing_u, parts_qs = jnp.zeros((*outer, width), jnp.float32), pairs_cbgrqs[..., None, :, :]
    while (half := parts_qs.shape[-1] // 2) >= LEAF:
        between_qs = parts_qs[..., half:, :half]
        first_u = _sum(jnp.tri(half, k=-1), "us,...s->...u", jnp.sum(between_qs, axis=-2))
        second_u = _sum(jnp.tri(half), "qu,...q->...u", jnp.sum(between_qs, axis=-1))
        passing_u += jnp.concatenate([first_u, second_u], axis=-1).reshape(*outer, width)
        halves = [parts_qs[..., :half, :half], parts_qs[..., half:, half:]]
        parts_qs = jnp.stack(halves, axis=-3).reshape(*outer, -1, half, half)
    q, s, u = jnp.ogrid[(slice(parts_qs.shape[-1]),) * 3]
    return passing_u + _sum((s < u) & (u <= q), "qsu,...qs->...u", parts_qs).reshape(*outer, width)


def _backward_states(decays: Decays, read_cbgnrp: Array, kept: Kept, dfinal_bgnrp: Array) -> tuple[Array, Array, Array]:
    """Gradients of the initial state, of what each chunk adds to it, and of the log of each chunk's whole decay.

    `read_cbgnrp` is the gradient that each entering state gets from the outputs of its chunk.
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
    runs_cbq, readable_cbqs = chunks.runs_cbq, _readable(chunks.runs_cbq)
    coarse_cbgrq, fine_cbgrq = (
        _sum(readable_cbqs, "cbqs,cbgrs->cbgrq", part)
        for part in in_two(chunks.log_decay_cbgrq, lowest=LOWEST_LOG_DECAY, terms=runs_cbq.shape[-1])
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


def in_two(log_decays: Array, *, lowest: float, terms: int) -> tuple[Array, Array]:
    """Numbers from `lowest` to 0 as multiples of a power of two, of which float32 adds up `terms` without an error in
    any order, and what is left.

    A decay from s to q is exp of l_q - l_s, where l is a sum over the chunk that strong decays make as large as 10^4:
    its last place is then 10^-3, and a weak decay is lost in it. The coarse parts' sums and their differences are
    exact, and the fine parts' are below -lowest terms^2 / 2^24 (0.09 for 128 terms from -88 on, 0.4 for 256, 6 for
    1024), with errors in the last places of that; so up to some hundred terms, exponents are right to about a unit of
    their last place whatever stands beside them. (A pair of floats by error-free transformations would do as well; but
    a running one is sequential, and what a compiler fuses or reorders can break it.)
    """
    grid = 2.0 ** (math.ceil(math.log2(-lowest * terms)) - 24)
    coarse = jnp.round(log_decays / grid) * grid
    return coarse, log_decays - coarse


def _readable(runs_cbq: Array) -> Array:
    """Whether q's sums reach back to s: no later than q, and no change of segment between. (c, b, q, s) bool"""
    return (runs_cbq[..., :, None] == runs_cbq[..., None, :]) & jnp.tri(runs_cbq.shape[-1], dtype=bool)


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


def _sum(mask: Array, axes: str, array: Array) -> Array:
    """The sums of `array` that `mask` picks, as a float32 product.

    Not `jnp.cumsum`: XLA:CPU repeats its arithmetic in each of the (q, s) elements that use it, 18 ms against 3 ms for
    the forward pass at b 4, t 256, h 8, p 32, n 32, chunk 128. And a sum that starts at the segment is the same,
    to the bit, whatever the segments before it hold.
    """
    return jnp.einsum(axes, mask.astype(jnp.float32), array, precision=lax.Precision.HIGHEST)


def _counts(changes_cbq: Array) -> Array:
    """How many changes up to and including each position of its chunk; ids may come back, counts do not."""
    return _sum(jnp.tri(changes_cbq.shape[-1]), "qs,cbs->cbq", changes_cbq)


def _cut(array_bt: Array, width: int) -> Array:
    """(b, t, ...) to (b, c, q, ...), the last chunk filled up with zeros."""
    batch, time = array_bt.shape[:2]
    missing = -time % width
    if missing:
        array_bt = jnp.pad(array_bt, ((0, 0), (0, missing)) + ((0, 0),) * (array_bt.ndim - 2))
    return array_bt.reshape(batch, -1, width, *array_bt.shape[2:])
