"""Keys and values in FP8 against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from orogen.precision.key_values import read, stored

SCALES = (0.037, 2.5)


def numbers(seed: int) -> np.ndarray:
    """Numbers of all sizes, midpoints of E4M3 and the float32 numbers beside them, and what is not finite."""
    rng = np.random.default_rng(seed)
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    beside = [np.nextafter(middle, side).astype(np.float32) for side in (np.float32(0), np.float32(500))]
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 448, 464, 1e30]
    return np.concatenate([rng.normal(size=3000) * np.exp(4 * rng.normal(size=3000)), middle, *beside, odd])


def test_numbers_are_those_of_ml_dtypes():
    """Products in float32, saturated; read again in float32 and in bfloat16, rounded once."""
    for dtype in (jnp.float32, jnp.bfloat16):
        k, v = (np.asarray(jnp.asarray(numbers(seed) * scale, dtype)) for seed, scale in enumerate(SCALES))
        found = jax.jit(lambda k, v: stored((k, v), SCALES))(k, v)
        back = jax.jit(lambda a, dtype=dtype: read(a, SCALES, dtype))(found)
        for x, kept, again, scale in zip((k, v), found, back, SCALES, strict=True):
            ratio = np.clip(x.astype(np.float32) * (np.float32(1) / np.float32(scale)), -448, 448)
            wanted = ratio.astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(np.asarray(kept).view(np.uint8) & 0x7F, wanted.view(np.uint8) & 0x7F)
            product = wanted.astype(np.float32) * np.float32(scale)
            np.testing.assert_array_equal(np.asarray(again, np.float32), np.float32(product.astype(again.dtype)))


def test_none_is_what_it_was():
    x = jnp.ones(3, jnp.bfloat16)
    assert stored((x,), None)[0] is x and read((x,), None, jnp.bfloat16)[0] is x
