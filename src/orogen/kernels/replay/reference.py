"""Replay by the recurrence: token by token from the checkpoint, through the ring and then the piece.

Axes: b batch, l entries of the ring, t new tokens, h heads, p head size, g groups, n state.
"""

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.replay.operands import FlushOperands, Operands, Ring, used, written
from orogen.kernels.ssd.operands import Operands as Sequence
from orogen.kernels.ssd.reference import ssd_reference
from orogen.kernels.state_update.reference import rounded


def replay_reference(o: Operands) -> tuple[Array, Ring]:
    """See `replay`; l + t steps, each over the whole state."""
    entries = o.ring.x_blhp.shape[1]
    join = lambda before, after: jnp.concatenate([before, after.astype(before.dtype)], axis=1)  # noqa: E731
    inputs = jax.tree.map(join, used(o.ring, o.cursor_b), o.piece)
    c_bsgn = join(jnp.zeros_like(o.ring.b_blgn), o.c_btgn)
    y_bshp, _ = _run(inputs, c_bsgn, o.a_h, o.state_bhpn, o.skip_h)
    y_bthp = jnp.where(o.active_b[:, None, None, None], y_bshp[:, entries:], 0)
    return y_bthp, written(o.ring, o.cursor_b, o.piece, o.active_b)


def flush_reference(o: FlushOperands) -> Array:
    """See `flush`."""
    inputs = used(o.ring, o.cursor_b)
    _, state_bhpn = _run(inputs, jnp.zeros_like(inputs.b_blgn), o.a_h, o.state_bhpn, jnp.zeros_like(o.a_h))
    moved_b = (o.flush_b & (o.cursor_b > 0))[:, None, None, None]
    return jnp.where(moved_b, rounded(state_bhpn, o.seeds_b2), o.state_bhpn)


def _run(inputs: Ring, c_btgn: Array, a_h: Array, state_bhpn: Array, skip_h: Array) -> tuple[Array, Array]:
    x_bthp, b_btgn, dt_bth = inputs
    segments_bt = jnp.zeros(x_bthp.shape[:2], jnp.int32)
    initial_bhpn = state_bhpn.astype(jnp.float32)
    return ssd_reference(Sequence(x_bthp, dt_bth, a_h, b_btgn, c_btgn, segments_bt, initial_bhpn, skip_h), chunk_size=1)
