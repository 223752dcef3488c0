"""Counters of what rounding loses, by operand. They leave the backward pass as the gradient of an array of zeros.

So a loop over layers, recomputation, microbatches, pipelines and sums over devices treat them as they treat gradients.
"""

import jax.numpy as jnp
from jax import Array

from orogen.config.precision import KINDS, ROLES
from orogen.precision.rounding import Encoded, magnitude

# The operands of a weight's three products, by what they are and which product reads them.
OPERANDS = {
    "forward": ("forward.x", "forward.w"),
    "input_gradient": ("input_gradient.dy", "input_gradient.w"),
    "weight_gradient": ("weight_gradient.x", "weight_gradient.dy"),
}
NAMES = tuple(name for role in ROLES for name in OPERANDS[role])
# Numbers; those that were 0; those that became 0; those beyond the largest number; those not finite; blocks whose scale
# is not 0, and the sum of log2 of these scales.
COUNTS = ("numbers", "zeros", "flushed", "saturated", "nonfinite", "blocks", "log2_scale")


def probe_shape(layers: int) -> tuple[int, ...]:
    """Of the zeros whose gradient counts for so many layers: (l, kinds of weight, operands, counters)."""
    return layers, len(KINDS), len(NAMES), len(COUNTS)


def count(x: Array, encoded: Encoded, *, filled: int = 0) -> Array:
    """The counters of one operand, float32, in the order of COUNTS. filled: how many zeros of x only fill up blocks."""
    size = magnitude(x)
    found = [size == 0, (encoded.value == 0) & (size > 0), encoded.saturated, ~jnp.isfinite(x), encoded.unit > 0]
    zeros, *others = (jnp.sum(a, dtype=jnp.float32) for a in found)
    scales = jnp.where(encoded.unit > 0, jnp.log2(jnp.where(encoded.unit > 0, encoded.unit, 1)), 0)
    numbers = jnp.full_like(zeros, x.size - filled)
    return jnp.stack([numbers, zeros - filled, *others, jnp.sum(scales, dtype=jnp.float32)])
