"""Stochastic rounding to float16: neighbours only, unbiased, down to subnormal numbers, and independent bits."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from orogen.kernels.stochastic import random_bits, to_float16

COUNT = 40_000


def words(first: int, second: int):
    return jnp.uint32(first), jnp.uint32(second)


def draws(value: float, seed: int = 0) -> np.ndarray:
    """COUNT roundings of a number."""
    bits = random_bits(words(seed, 5), jnp.arange(COUNT))
    return np.asarray(to_float16(jnp.full(COUNT, value, jnp.float32), bits), np.float64)


# Halves and tenths of a unit in the last place, either sign; of subnormal numbers; over a power of two; near the range.
@pytest.mark.parametrize("value", [1 + 2.0**-11, -1 - 2.0**-13, 3e-6, -2e-8, 1e-9, 2 - 2.0**-12, 65_500.3, 0.1, -333.3])
def test_is_one_of_both_neighbours_and_unbiased(value: float):
    exact = float(np.float32(value))
    found = draws(value)
    with np.errstate(over="ignore"):
        nearest = np.float16(exact)
    other = np.nextafter(nearest, np.float16(np.inf if float(nearest) < exact else -np.inf))
    neighbours = sorted((float(nearest), float(other)))
    assert set(found.tolist()) <= set(neighbours)
    unit = neighbours[1] - neighbours[0]
    up = (exact - neighbours[0]) / unit
    assert abs(np.mean(found == neighbours[1]) - up) <= 4 * np.sqrt(up * (1 - up) / COUNT)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 2.0**-24, 65504.0, np.inf, -np.inf, np.nan])
def test_what_float16_holds_stays(value: float):
    np.testing.assert_array_equal(draws(value), np.full(COUNT, value))


def test_the_least_bits_round_up_all_but_what_float16_holds():
    x = jnp.asarray([1.0, 1 + 2.0**-20, -1 - 2.0**-20], jnp.float32)
    np.testing.assert_array_equal(to_float16(x, jnp.zeros(3, jnp.uint32)), [1, 1 + 2.0**-10, -1])


def test_what_is_beyond_its_range_is_infinite():
    assert set(draws(70_000.0)) == {np.inf} and set(draws(-1e30)) == {-np.inf}


def test_bits_are_even_and_differ_by_word_and_element():
    bits = [random_bits(words(*pair), jnp.arange(COUNT)) for pair in ((0, 0), (1, 0), (0, 1), (2**32 - 1, 7))]
    unpacked = np.array([np.unpackbits(np.asarray(b).view(np.uint8)).reshape(COUNT, 32) for b in bits], np.float64)
    assert np.abs(unpacked.mean(1) - 0.5).max() <= 5 * 0.5 / np.sqrt(COUNT)
    # No bit of any pair of streams, or of an element and the next, goes with another.
    signs = 2 * unpacked - 1
    streams = np.concatenate([*signs, signs[0, np.arange(1, COUNT + 1) % COUNT]], axis=1)
    correlation = streams.T @ streams / COUNT - np.eye(streams.shape[1])
    assert np.abs(correlation).max() <= 5.5 / np.sqrt(COUNT)


def test_the_first_element_of_zero_words_has_bits_too():
    assert int(random_bits(words(0, 0), jnp.zeros((), jnp.int32))) != 0


def test_is_the_same_under_jit():
    x, bits = jnp.linspace(-3, 3, 101), random_bits(words(3, 4), jnp.arange(101))
    np.testing.assert_array_equal(jax.jit(to_float16)(x, bits), to_float16(x, bits))
