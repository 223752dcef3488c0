"""Shared by the chunked versions of the Mamba-2 recurrence: log decays, chunks, and sums over a chunk's tokens.

Axes: b batch, t time, h heads, c chunks, q position in a chunk, s position in the chunk that q reads from, u position
passed over on the way from s to q.
"""

import math

from jax import Array, lax
from jax import numpy as jnp

# exp of anything lower is not a normal float32. Clipping here bounds the sums over a chunk.
LOWEST_LOG_DECAY = -88.0


def log_decays(dt_bth: Array, a_h: Array) -> Array:
    """The natural log of each token's decay, clipped. (b, t, h) float32"""
    return jnp.maximum(dt_bth.astype(jnp.float32) * a_h.astype(jnp.float32), LOWEST_LOG_DECAY)


def _changes(segments_bt: Array) -> Array:
    """1 where a token's segment differs from the previous token's, else 0. (b, t) float32"""
    changes_bt = (segments_bt[:, 1:] != segments_bt[:, :-1]).astype(jnp.float32)
    # A row's first token continues the initial state, so it never counts as a change.
    return jnp.pad(changes_bt, ((0, 0), (1, 0)))


def in_chunks(array_bt: Array, width: int) -> Array:
    """(b, t, ...) to (b, c, q, ...), the last chunk padded with zeros."""
    batch, time = array_bt.shape[:2]
    missing = -time % width
    if missing:
        array_bt = jnp.pad(array_bt, ((0, 0), (0, missing)) + ((0, 0),) * (array_bt.ndim - 2))
    return array_bt.reshape(batch, -1, width, *array_bt.shape[2:])


def in_two(log_decays: Array, *, lowest: float, terms: int) -> tuple[Array, Array]:
    """Splits numbers from `lowest` to 0 exactly into a coarse and a fine part.

    The coarse part is a multiple of a power of two, chosen so that a float32 sum of `terms` of them is exact in any
    order.

    A decay from s to q is exp(l_q - l_s), where l is a running sum over the chunk. Strong decays make l as large as
    10^4; its ulp is then 10^-3, in which a weak decay is lost. The sums of the coarse parts, and the differences of
    these sums, are exact. Those of the fine parts are below -lowest terms^2 / 2^24 (0.09 for 128 terms from -88 on, 0.4
    for 256, 6 for 1024), with errors of a few ulps. So up to a few hundred terms, exponents are right to about one ulp,
    however strong the other decays are. (Pairs of floats with error-free transformations would do as well, but their
    running sum is sequential, and a compiler that fuses or reorders operations can break it.)
    """
    grid = 2.0 ** (math.ceil(math.log2(-lowest * terms)) - 24)
    coarse = jnp.round(log_decays / grid) * grid
    return coarse, log_decays - coarse


def masked_sum(mask: Array, axes: str, array: Array) -> Array:
    """Sums the elements of `array` that `mask` selects, as a float32 product.

    Not `jnp.cumsum`: XLA:CPU recomputes it in each of the (q, s) elements that use it, 18 ms against 3 ms for the
    forward pass at b 4, t 256, h 8, p 32, n 32, chunk 128. And a sum that starts at the segment is the same to the bit
    whatever the earlier segments hold.
    """
    return jnp.einsum(axes, mask.astype(jnp.float32), array, precision=lax.Precision.HIGHEST)


def runs_in_chunks(segments_bt: Array, width: int) -> Array:
    """The number of segment changes in the chunk up to and including each position. (b, c, q) float32

    Segment ids may recur but counts do not, so equal counts mean one run of tokens of one segment.
    """
    changes_bcq = in_chunks(_changes(segments_bt), width)
    return masked_sum(jnp.tri(width), "qs,bcs->bcq", changes_bcq)


def readable(runs_q: Array) -> Array:
    """Whether q's sums reach back to s: s is not later than q, and the segment does not change. (..., q, s) bool"""
    same_run_qs = runs_q[..., :, None] == runs_q[..., None, :]
    return same_run_qs & jnp.tri(runs_q.shape[-1], dtype=bool)


def across_tokens(read_q: Array, left_s: Array, dwhole: Array) -> Array:
    """The gradient of each token's log decay (..., u), from the terms that pass over it on the way from or to a state.

    `read_q` (..., q) are the terms that q reads from the entering state, which pass over every u <= q; `left_s`
    (..., s) those that s adds to the leaving state, which pass over every u > s; `dwhole` (...) those that pass over
    the whole chunk.
    """
    width = read_q.shape[-1]
    read_u = masked_sum(jnp.tri(width), "qu,...q->...u", read_q)
    left_u = masked_sum(jnp.tri(width, k=-1), "us,...s->...u", left_s)
    return read_u + left_u + dwhole[..., None]
