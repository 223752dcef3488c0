"""Mamba-2 decoding from a checkpoint of the state and the inputs since then (ReplaySSM), by implementation name.

Axes: b batch, l entries of the ring, t new tokens, h heads, p head size, g groups, n state.

The plain update reads and writes the state for every token. Here the state stays at a checkpoint some tokens ago, the
inputs since then are kept in a ring, and a token's output is computed from both: the state is read once per piece of
new tokens, and written once per ring. To roll tokens back, as speculative decoding does with rejected drafts, the
caller moves the cursor.
"""

import functools

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.replay.operands import FlushOperands, Operands, Ring, SelectiveRing
from orogen.kernels.replay.parallel import flush_parallel, replay_parallel
from orogen.kernels.replay.reference import flush_reference, replay_reference
from orogen.kernels.replay.selective import selective_flush, selective_replay
from orogen.kernels.replay.triton import flush_triton, replay_triton
from orogen.kernels.state_update import require_state
from orogen.parallel.varying import vary_like

__all__ = ["Ring", "SelectiveRing", "flush", "replay", "selective_flush", "selective_replay"]

IMPLEMENTATIONS = {
    "recurrence": replay_reference,
    "parallel": replay_parallel,
    "triton": replay_triton,
    "triton_interpreted": functools.partial(replay_triton, interpret=True),
}
FLUSH_IMPLEMENTATIONS = {
    "recurrence": flush_reference,
    "parallel": flush_parallel,
    "triton": flush_triton,
    "triton_interpreted": functools.partial(flush_triton, interpret=True),
}


def replay(
    piece: Ring,
    a_h: Array,
    c_btgn: Array,
    *,
    state_bhpn: Array,
    ring: Ring,
    cursor_b: Array,
    skip_h: Array | None = None,
    active_b: Array | None = None,
    implementation: str,
) -> tuple[Array, Ring]:
    """Outputs (b, t, h, p) of the piece's t tokens in x's dtype, and the ring with the piece written at the cursor.

    The outputs are those of `ssd`, with the same letters and signs, run from the state over the first `cursor_b`
    (int32) inputs of the ring and then over the piece. Entries of the ring from the cursor on are not read and may hold
    anything. The caller moves the cursor: by t, or by less to roll tokens back. The ring must have t entries left from
    the cursor on; tokens past its end are not stored. Sequences where `active_b` (bool; None: all) is False keep their
    ring and give zeros. All implementations compute in float32; the state is float32 or float16.
    `triton` is made for few tokens, 1 to 8: it reads the state once, writes only the piece, in place if the caller
    donates the ring, and needs an NVIDIA GPU.

    Raises ValueError if shapes disagree, heads are not a multiple of groups, or the name is unknown or cannot run here.
    Source: ReplaySSM, https://github.com/Johnny-Liou/ReplaySSM (2026).
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    heads = _check(ring, a_h, state_bhpn, cursor_b)
    if piece.x_blhp.ndim != 4:
        raise ValueError(f"x {piece.x_blhp.shape}: expected (b, t, h, p)")
    (batch, tokens), rest, group = piece.x_blhp.shape[:2], ring.x_blhp.shape[2:], ring.b_blgn.shape[2:]
    expected = {
        "x": (piece.x_blhp, (len(cursor_b), tokens, *rest)),
        "B": (piece.b_blgn, (batch, tokens, *group)),
        "dt": (piece.dt_blh, (batch, tokens, heads)),
        "C": (c_btgn, (batch, tokens, *group)),
        "skip": (skip_h, (heads,)),
        "active": (active_b, (batch,)),
    }
    require_shapes(expected, beside=f"x {piece.x_blhp.shape} and a ring of {ring.x_blhp.shape}")
    skip_h = jnp.zeros(heads, jnp.float32) if skip_h is None else skip_h.astype(jnp.float32)
    active_b = jnp.ones(batch, bool) if active_b is None else active_b
    piece = piece._replace(dt_blh=piece.dt_blh.astype(jnp.float32))
    operands = Operands(state_bhpn, ring, cursor_b, piece, c_btgn, a_h.astype(jnp.float32), skip_h, active_b)
    return run(vary_like(operands, operands))


def flush(
    ring: Ring,
    a_h: Array,
    cursor_b: Array,
    *,
    state_bhpn: Array,
    flush_b: Array | None = None,
    seeds_b2: Array | None = None,
    implementation: str,
) -> tuple[Array, Array]:
    """The state (b, h, p, n) after the first `cursor_b` inputs of the ring, in its dtype, and the cursors, now 0.

    Sequences where `flush_b` (bool; None: all) is False keep both. A state without inputs stays the same to the bit,
    and `triton` does not read it. The arithmetic is float32 throughout and, except in `parallel`, that of one
    `ssm_update` per token. A float16 state is rounded at random once, at the end, which needs `seeds_b2` as in
    `ssm_update`.

    Raises ValueError as `replay` does, and if the state's dtype and the seeds disagree.
    """
    run = chosen(FLUSH_IMPLEMENTATIONS, implementation)
    _check(ring, a_h, state_bhpn, cursor_b)
    require_state(state_bhpn, seeds_b2)
    batch = len(cursor_b)
    expected = {"flush": (flush_b, (batch,)), "seeds": (seeds_b2, (batch, 2))}
    require_shapes(expected, beside=f"a ring of {ring.x_blhp.shape}")
    flush_b = jnp.ones(batch, bool) if flush_b is None else flush_b
    operands = FlushOperands(state_bhpn, ring, cursor_b, a_h.astype(jnp.float32), flush_b, seeds_b2)
    operands = vary_like(operands, operands)
    return run(operands), jnp.where(operands.flush_b, 0, operands.cursor_b)


def _check(ring: Ring, a_h: Array, state_bhpn: Array, cursor_b: Array) -> int:
    """The number of heads. Raises ValueError naming the first operand whose shape does not fit the ring."""
    if ring.x_blhp.ndim != 4 or ring.b_blgn.ndim != 4 or ring.x_blhp.shape[1] < 1:
        shapes = f"ring of x {ring.x_blhp.shape}, B {ring.b_blgn.shape}"
        raise ValueError(f"{shapes}: expected (b, l, h, p) and (b, l, g, n) with l >= 1")
    (batch, entries, heads, head_size), (groups, state) = ring.x_blhp.shape, ring.b_blgn.shape[2:]
    if not groups or heads % groups:
        raise ValueError(f"{heads} heads over {groups} groups: expected a multiple")
    expected = {
        "B of the ring": (ring.b_blgn, (batch, entries, groups, state)),
        "dt of the ring": (ring.dt_blh, (batch, entries, heads)),
        "a": (a_h, (heads,)),
        "state": (state_bhpn, (batch, heads, head_size, state)),
        "cursor": (cursor_b, (batch,)),
    }
    require_shapes(expected, beside=f"a ring of {ring.x_blhp.shape}")
    return heads
