"""Norms whose epsilon is too small to protect tiny vectors: these are scaled up before they are squared."""

import math

import jax.numpy as jnp
from jax import Array, lax

# From this ε on, float32 can hold ε^(-3/2), which the derivative of a norm needs, and a square that underflows is
# negligible against ε.
LEAST_EPSILON = 1e-24


def enlarged(u: Array, epsilon: float, total: Array) -> tuple[Array, Array]:
    """u / a and ε / a², which normalise to the same values as u and ε.

    a is the power of two nearest to `total`, the sum of |u| over a vector, or to sqrt(ε) if that is larger. Without
    the scaling, the squares of vectors below 1e-19 underflow in float32, and the norm is lost.
    """
    size = jnp.maximum(total.astype(jnp.float32), math.sqrt(epsilon))
    size = lax.reduce_precision(lax.stop_gradient(size), exponent_bits=8, mantissa_bits=0)
    size = jnp.where(size > 0, size, 1.0)
    return u / size, jnp.square(math.sqrt(epsilon) / size)
