"""Replay of Mamba-1: the recurrence, from the checkpoint through the ring and then the piece.

Axes: b batch, l entries of the ring, t new tokens, i channels, n state.

It has no kernel, because a kernel would not pay. The plain update reads and writes a channel's state of n numbers: 128
bytes per token if n is 16. A channel's share of the ring is 6 bytes per token, for x and its own dt, so a ring of 16,
half full on average, is 48 bytes. With 64 bytes of state read, and 64 written every 16 tokens, that makes 116 bytes per
token, a tenth less. And every (i, n) has a decay of its own, so each token of the ring costs one exponential per number
of the state. What is left, and what this module is for, is that the state can be rolled back to an earlier token.
"""

from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import require_shapes
from orogen.kernels.replay.operands import SelectiveRing, used, written
from orogen.kernels.selective_scan.operands import Operands
from orogen.kernels.selective_scan.reference import selective_scan_reference
from orogen.kernels.state_update import require_state
from orogen.kernels.state_update.reference import rounded
from orogen.parallel.varying import vary_like


def selective_replay(
    piece: SelectiveRing,
    A_in: Array,
    C_btn: Array,
    *,
    state_bin: Array,
    ring: SelectiveRing,
    cursor_b: Array,
    active_b: Array | None = None,
) -> tuple[Array, SelectiveRing]:
    """Outputs (b, t, i) of the piece's t tokens in x's dtype, and the ring with the piece, as in `replay`.

    The skip is the caller's, as in `selective_scan`. Raises ValueError if the shapes disagree.
    """
    _check(ring, A_in, state_bin)
    (batch, tokens, channels), state = piece.x_bli.shape, A_in.shape[1]
    expected = {
        "x": (piece.x_bli, (batch, tokens, ring.x_bli.shape[2])),
        "B": (piece.B_bln, (batch, tokens, state)),
        "dt": (piece.dt_bli, (batch, tokens, channels)),
        "C": (C_btn, (batch, tokens, state)),
        "cursor": (cursor_b, (len(ring.x_bli),)),
        "active": (active_b, (batch,)),
    }
    require_shapes(expected, beside=f"x {piece.x_bli.shape} and a ring of {ring.x_bli.shape}")
    active_b = jnp.ones(batch, bool) if active_b is None else active_b
    operands: Any = (piece, A_in, C_btn, state_bin, ring, cursor_b, active_b)
    piece, A_in, C_btn, state_bin, ring, cursor_b, active_b = vary_like(operands, operands)
    assert active_b is not None  # as above
    join = lambda before, after: jnp.concatenate([before, after.astype(before.dtype)], axis=1)  # noqa: E731
    inputs = jax.tree.map(join, used(ring, cursor_b), piece)
    y_bsi, _ = _run(inputs, join(jnp.zeros_like(ring.B_bln), C_btn), A_in, state_bin)
    y_bti = jnp.where(active_b[:, None, None], y_bsi[:, ring.x_bli.shape[1] :], 0)
    return y_bti, written(ring, cursor_b, piece, active_b)


def selective_flush(
    ring: SelectiveRing,
    A_in: Array,
    cursor_b: Array,
    *,
    state_bin: Array,
    flush_b: Array | None = None,
    seeds_b2: Array | None = None,
) -> tuple[Array, Array]:
    """The state (b, i, n) in its dtype and the cursors (b,), as in `flush`. Raises ValueError as `flush` does."""
    _check(ring, A_in, state_bin)
    require_state(state_bin, seeds_b2)
    batch = len(ring.x_bli)
    expected = {"cursor": (cursor_b, (batch,)), "flush": (flush_b, (batch,)), "seeds": (seeds_b2, (batch, 2))}
    require_shapes(expected, beside=f"a ring of {ring.x_bli.shape}")
    flush_b = jnp.ones(batch, bool) if flush_b is None else flush_b
    operands: Any = (ring, A_in, cursor_b, state_bin, flush_b, seeds_b2)
    ring, A_in, cursor_b, state_bin, flush_b, seeds_b2 = vary_like(operands, operands)
    assert flush_b is not None  # as above
    inputs = used(ring, cursor_b)
    _, moved_bin = _run(inputs, jnp.zeros_like(inputs.B_bln), A_in, state_bin)
    moves_b = (flush_b & (cursor_b > 0))[:, None, None]
    return jnp.where(moves_b, rounded(moved_bin, seeds_b2), state_bin), jnp.where(flush_b, 0, cursor_b)


def _run(inputs: SelectiveRing, C_btn: Array, A_in: Array, state_bin: Array) -> tuple[Array, Array]:
    segments_bt, initial_bin = jnp.zeros(inputs.x_bli.shape[:2], jnp.int32), state_bin.astype(jnp.float32)
    x_bti, B_btn, dt_bti = inputs
    return selective_scan_reference(Operands(x_bti, dt_bti, A_in, B_btn, C_btn, segments_bt, initial_bin), chunk_size=1)


def _check(ring: SelectiveRing, A_in: Array, state_bin: Array) -> None:
    batch, entries, channels = ring.x_bli.shape
    expected = {
        "A": (A_in, (channels, A_in.shape[1])),
        "B of the ring": (ring.B_bln, (batch, entries, A_in.shape[1])),
        "dt of the ring": (ring.dt_bli, (batch, entries, channels)),
        "state": (state_bin, (batch, channels, A_in.shape[1])),
    }
    require_shapes(expected, beside=f"a ring of {ring.x_bli.shape}")
