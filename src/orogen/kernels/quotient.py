"""Division whose gradient does not square the denominator."""

import jax
from jax import Array


@jax.custom_jvp
def quotient(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, with (dx - q dy) / y as its derivative, q the quotient itself.

    JAX's own takes x / y² of denominators, and a float32 y below 1e-19 has no square: 0 · inf follows. What torch
    computes is this.
    """
    return numerator / denominator


@quotient.defjvp
def _quotient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (numerator, denominator), (dnumerator, ddenominator) = primals, tangents
    ratio = quotient(numerator, denominator)
    return ratio, (dnumerator - ratio * ddenominator) / denominator
