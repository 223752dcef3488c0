"""States in int8 blocks against numpy, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.config.dtype import state_bytes
from orogen.kernels.state_blocks import BLOCK, Blocks, decode, encode

encode_jit, decode_jit = jax.jit(encode), jax.jit(decode)


def expected(state, uniform=None):
    """Values and scales by loops over blocks, in numpy's float32. uniform: in [0, 1), None: to the nearest."""
    values, scales = np.zeros(state.shape, np.int8), []
    for start in range(0, state.shape[-1], BLOCK):
        part = state[..., start : start + BLOCK]
        scale = np.abs(part).max(-1, keepdims=True) * (np.float32(1) / np.float32(127))
        scales.append(scale)
        ratio = np.divide(part, scale, out=np.zeros_like(part), where=scale > 0)
        if uniform is None:
            whole = np.rint(ratio)
        else:
            whole = np.floor(ratio) + (uniform[..., start : start + BLOCK] < ratio - np.floor(ratio))
        values[..., start : start + BLOCK] = whole.clip(-127, 127)
    return values, np.concatenate(scales, -1)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_equals_loops_over_blocks(size):
    """To the bit, to the nearest and at random; blocks of very different size."""
    rng = np.random.default_rng(size)
    state = (rng.normal(size=(3, 2, size)) * np.exp(4 * rng.normal(size=(3, 2, 1)))).astype(np.float32)
    state[1, 1] = 0
    bits = rng.integers(0, 2**32, state.shape, np.uint32)
    for words, uniform in ((None, None), (bits, (bits >> 8).astype(np.float32) * np.float32(2**-24))):
        found, (values, scales) = encode_jit(state, words), expected(state, uniform)
        np.testing.assert_array_equal(found.values, values)
        np.testing.assert_array_equal(found.scales, scales)
        every = np.repeat(scales, BLOCK, -1)[..., :size]
        np.testing.assert_array_equal(decode_jit(found), values.astype(np.float32) * every)
    stored = sum(np.asarray(a).nbytes for a in found)
    assert stored == 3 * 2 * state_bytes("int8", size)


def test_random_rounding_keeps_the_mean():
    """The mean of many roundings lies within five standard errors; to the nearest, small numbers vanish."""
    draws = np.random.default_rng(0).integers(0, 2**32, (4000, 3), np.uint32)
    state = np.array([127.0, 0.3, -2.7], np.float32)
    several = jax.vmap(lambda bits: decode(encode(jnp.asarray(state), bits)))(draws)
    spread = np.sqrt(np.array([0, 0.3 * 0.7, 0.3 * 0.7]) / len(draws))
    assert (np.abs(np.asarray(several).mean(0) - state) <= 5 * spread + 1e-6).all()
    np.testing.assert_array_equal(decode(encode(jnp.asarray(state))), [127, 0, -3])


def test_what_is_not_finite_spoils_its_block_alone():
    """The largest float32 and the smallest numbers stay what they are."""
    state = np.ones((4, 260), np.float32)
    state[0, 3], state[1, 200], state[2, 259], state[3, :BLOCK] = np.nan, np.inf, 3e38, 1e-30
    found = np.asarray(decode_jit(encode_jit(state)))
    bad = np.zeros(state.shape, bool)
    bad[0, :128] = bad[1, 128:256] = True
    np.testing.assert_array_equal(np.isnan(found), bad)
    np.testing.assert_allclose(found[2, 256:], [0, 0, 0, 3e38], rtol=1e-6)
    np.testing.assert_allclose(found[3, :BLOCK], 1e-30, rtol=1e-6)


def test_zeros_are_zeros():
    empty = Blocks.zeros((2, 130))
    assert empty.scales.shape == (2, 2) and not np.asarray(decode(empty)).any()
