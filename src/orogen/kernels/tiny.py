"""Norms whose epsilon is too small to hold up tiny rows: these are enlarged before they are squared."""

import math

import jax.numpy as jnp
from jax import Array, lax

# From here on float32 has the inverse cube of ε's root, which the derivative of a norm takes, and a square below its
# range is nothing beside ε.
LEAST_EPSILON = 1e-24


def enlarged(u: Array, epsilon: float, total: Array) -> tuple[Array, Array]:
    """u / a and ε / a², which have the norm of u and ε; a is a power of two near `total`, the sum of a row's |u|,
    and no less than the root of ε.

    Without it the squares of rows below 1e-19 vanish in float32, and their norm with them.
    """
    size = jnp.maximum(total.astype(jnp.float32), math.sqrt(epsilon))
    size = lax.reduce_precision(lax.stop_gradient(size), exponent_bits=8, mantissa_bits=0)
    size = jnp.where(size > 0, size, 1.0)
    return u / size, jnp.square(math.sqrt(epsilon) / size)
