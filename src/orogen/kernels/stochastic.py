"""Stochastic rounding to float16: up or down at random, so that the expected result is the number itself.

A state that is rounded to nearest after every token loses each update below half a unit of its last place; rounded at
random, it keeps them on average. The random bits are a function of two words per row and of an element's place in the
row: what a row holds depends on no other row, and repeats to the bit.
"""

import numpy as np
from jax import Array, lax
from jax import numpy as jnp

FRACTION = 10  # bits of float16
LOWEST_EXPONENT = -14  # of a normal float16; below it, units of the last place stay the same
BIAS = 127  # of a float32's exponent


def random_bits(seeds: tuple[Array, Array], element: Array) -> Array:
    """uint32 bits of an element, from its row's two words (uint32) and its number in the row (int32).

    Counter-based: the row's words become one key, and an element costs two mixings of 32 bits, 17 operations. By its
    data sheet an H100 has time for about as many while it reads and writes one float16.
    """
    first, second = seeds
    key = _mix(_mix(first + np.uint32(0x9E3779B9)) ^ second)  # not of zero, which `_mix` maps to itself
    return _mix(key ^ _mix(element.astype(jnp.uint32)))


def _mix(bits: Array) -> Array:
    """A permutation of 32 bits, each of whose outputs depends on all inputs (C. Wellons' `lowbias32`, 2018)."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
    return bits ^ (bits >> np.uint32(16))


def to_float16(x: Array, bits: Array) -> Array:
    """x (float32) as float16: one of its two neighbours, the nearer with the greater probability; exact numbers stay.

    The probability is right to 2^-24. What lies beyond float16's range becomes infinite; NaN stays NaN.
    """
    exponent = ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - BIAS
    unit = jnp.maximum(exponent, LOWEST_EXPONENT) - FRACTION  # exponent of x's last place in float16
    # Both products are by powers of two, so exact.
    scaled = x * _power_of_two(-unit)
    below = jnp.floor(scaled)
    uniform = (bits >> np.uint32(8)).astype(jnp.float32) * 2.0**-24
    rounded = below + (uniform < scaled - below).astype(jnp.float32)
    return (rounded * _power_of_two(unit)).astype(jnp.float16)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + BIAS) << 23, jnp.float32)
