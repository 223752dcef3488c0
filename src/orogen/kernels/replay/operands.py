"""The arrays that replay takes: a checkpoint of the state, a ring of the inputs since then, and a piece of new ones.

Axes: b batch, l entries of the ring, t new tokens, h heads, p head size, g groups, n state, i channels.
"""

from typing import NamedTuple, TypeVar

import jax
from jax import Array
from jax import numpy as jnp


class Ring(NamedTuple):
    """Inputs of Mamba-2, in the order of the tokens: x and B in the activations' dtype, the step dt in float32."""

    x_blhp: Array
    b_blgn: Array
    dt_blh: Array


class SelectiveRing(NamedTuple):
    """Inputs of Mamba-1, as `Ring`."""

    x_bli: Array
    B_bln: Array
    dt_bli: Array


AnyRing = TypeVar("AnyRing", Ring, SelectiveRing)


class Operands(NamedTuple):
    """See `replay`; shapes and dtypes agree. The piece is a ring of the t new tokens; a and the skip are float32."""

    state_bhpn: Array
    ring: Ring
    cursor_b: Array
    piece: Ring
    c_btgn: Array
    a_h: Array
    skip_h: Array
    active_b: Array


class FlushOperands(NamedTuple):
    """See `flush`; the seeds are None with a float32 state."""

    state_bhpn: Array
    ring: Ring
    cursor_b: Array
    a_h: Array
    flush_b: Array
    seeds_b2: Array | None


def used(ring: AnyRing, cursor_b: Array) -> AnyRing:
    """The ring with its entries from the cursor on, which may hold anything, set to zero: steps of length zero."""
    used_bl = jnp.arange(ring[0].shape[1]) < cursor_b[:, None]
    return jax.tree.map(lambda a_bl: jnp.where(used_bl.reshape(*used_bl.shape, *[1] * (a_bl.ndim - 2)), a_bl, 0), ring)


def written(ring: AnyRing, cursor_b: Array, piece: AnyRing, active_b: Array) -> AnyRing:
    """The ring with the piece written at the cursor, in active sequences; tokens past its end are dropped."""
    batch, tokens = piece[0].shape[:2]
    past_end = ring[0].shape[1]
    entry_bt = jnp.where(active_b[:, None], cursor_b[:, None] + jnp.arange(tokens), past_end)
    at = jnp.arange(batch)[:, None], entry_bt
    return jax.tree.map(lambda a_bl, a_bt: a_bl.at[at].set(a_bt.astype(a_bl.dtype), mode="drop"), ring, piece)
