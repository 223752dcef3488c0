"""Replay of Mamba-1 against the recurrence in float64 over the whole sequence.

Axes: b batch, l places of the ring, t tokens, i channels, n state.
"""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.kernels.rounding import assert_within, tolerance

from orogen.kernels.replay import SelectiveRing, selective_flush, selective_replay

B, CHANNELS, N, PLACES, TIME = 3, 10, 7, 6, 11


def draw(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def operands():
    """Inputs, C, rates and the first state."""
    x, dt, b, c = (draw(B, TIME, size, seed=s) for s, size in enumerate((CHANNELS, CHANNELS, N, N)))
    return SelectiveRing(x, b, jnp.abs(dt)), c, -jnp.abs(draw(CHANNELS, N, seed=8)), draw(B, CHANNELS, N, seed=9)


def expected():
    """All outputs and states, in numpy."""
    (x, b, dt), c, rates, state = jax.tree.map(lambda a: np.asarray(a, np.float64), operands())
    ys, states = [], []
    for t in range(TIME):
        state = np.exp(dt[:, t, :, None] * rates) * state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        ys.append(np.einsum("bin,bn->bi", state, c[:, t]))
        states.append(state)
    return np.stack(ys, 1), np.stack(states, 1)


def test_pieces_equal_the_whole_sequence():
    """Of two rows; the third rests."""
    inputs, c_btn, A_in, state = operands()
    ring = jax.tree.map(lambda a: jnp.full((B, PLACES, *a.shape[2:]), jnp.nan), inputs)
    cursor_b, ys, first, active_b = jnp.zeros(B, jnp.int32), [], 0, jnp.array([True, True, False])
    for count in (3, 2, 1, 4, 1):
        if int(cursor_b[0]) + count > PLACES:
            state, cursor_b = jax.jit(selective_flush)(ring, A_in, cursor_b, state_bin=state, flush_b=active_b)
            assert cursor_b.tolist() == [0, 0, 6]
        piece = jax.tree.map(lambda a, f=first, n=count: a[:, f : f + n], inputs)
        y, ring = jax.jit(selective_replay)(
            piece, A_in, c_btn[:, first : first + count], state_bin=state, ring=ring, cursor_b=cursor_b,
            active_b=active_b,
        )  # fmt: skip
        cursor_b, first = cursor_b + count, first + count
        ys.append(y)
    want, states = expected()
    y_bti, limit = jnp.concatenate(ys, axis=1), tolerance(jnp.float32, terms=TIME * N)
    assert_within(y_bti[:2], want[:2], limit)
    assert_within(state[:2], states[:2, 5], limit)
    assert not y_bti[2].any() and jnp.isnan(ring.x_bli[2]).all()
    np.testing.assert_array_equal(state[2], operands()[3][2])


def test_refusals():
    ring, c_btn, A_in, state = operands()
    cursor_b = jnp.zeros(B, jnp.int32)
    with pytest.raises(ValueError, match=r"state has shape \(3, 10, 6\): expected \(3, 10, 7\)"):
        selective_replay(ring, A_in, c_btn, state_bin=state[..., 1:], ring=ring, cursor_b=cursor_b)
    with pytest.raises(ValueError, match=r"C has shape \(3, 10, 7\): expected \(3, 11, 7\)"):
        selective_replay(ring, A_in, c_btn[:, 1:], state_bin=state, ring=ring, cursor_b=cursor_b)
    with pytest.raises(ValueError, match="state of float16 with no seeds"):
        selective_flush(ring, A_in, cursor_b, state_bin=state.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"cursor has shape \(2,\)"):
        selective_flush(ring, A_in, cursor_b[1:], state_bin=state)
