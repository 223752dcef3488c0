"""Stochastic rounding to float16: up or down at random, so that the expected result is the number itself.

A state that is rounded to nearest after every token loses each update below half a unit in the last place (ulp);
rounded at random, it keeps them on average. The random bits are a function of two words per sequence and of the
element's index in that sequence's state. So a sequence's state depends on no other sequence, and repeats to the bit.
"""

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

FRACTION = 10  # bits of float16
LOWEST_EXPONENT = -14  # of a normal float16; below it, the ulp stays the same
BIAS = 127  # of a float32's exponent


def random_bits(seeds: tuple[Array, Array], element: Array) -> Array:
    """Random uint32 bits of an element, from its sequence's two words (uint32) and its index in the state (int32).

    Counter-based: the two words are mixed into one key, and each element then costs two 32-bit mixes, 17 operations.
    By its data sheet, an H100 can do about as many in the time it takes to read and write one float16.
    """
    first, second = seeds
    key = mix(mix(first + np.uint32(0x9E3779B9)) ^ second)  # the constant, since `mix` maps zero to itself
    return mix(key ^ mix(element.astype(jnp.uint32)))


def mix(bits: Array) -> Array:
    """A bijection of 32-bit words; every output bit depends on every input bit (C. Wellons' `lowbias32`, 2018)."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
    return bits ^ (bits >> np.uint32(16))


def to_float16(x: Array, bits: Array) -> Array:
    """x (float32) rounded to one of its two float16 neighbours, the nearer one more often; float16 numbers stay.

    The probability is exact to 2^-24. Values beyond float16's range become infinite; NaN stays NaN.
    """
    exponent = ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - BIAS
    unit = jnp.maximum(exponent, LOWEST_EXPONENT) - FRACTION  # exponent of x's ulp in float16
    # Both products are with powers of two, so they are exact.
    scaled = x * _power_of_two(-unit)
    below = jnp.floor(scaled)
    uniform = (bits >> np.uint32(8)).astype(jnp.float32) * 2.0**-24
    rounded = below + (uniform < scaled - below).astype(jnp.float32)
    return (rounded * _power_of_two(unit)).astype(jnp.float16)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + BIAS) << 23, jnp.float32)
