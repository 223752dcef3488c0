"""Counters of what rounding loses, by operand. They leave the backward pass as the gradient of an array of zeros.

So a loop over layers, recomputation, microbatches, pipelines and sums over devices treat them as they treat gradients.
"""

import math
from collections.abc import Sequence

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


def count(x: Array, encoded: Encoded, held: Sequence[Array]) -> Array:
    """The counters of one operand, float32, in the order of COUNTS.

    held: masks of what counts, since it is not there to fill up x, each along an axis of its own and of size 1 along
    the others; a number counts if all masks hold it, a block if it is not of zeros alone.
    """
    size, inside = magnitude(x), math.prod(held, start=jnp.ones((), bool))
    found = [size == 0, (encoded.value == 0) & (size > 0), encoded.saturated, ~jnp.isfinite(x)]
    sums = [jnp.sum(a & inside, dtype=jnp.float32) for a in found]
    used = encoded.unit > 0
    scales = jnp.where(used, jnp.log2(jnp.where(used, encoded.unit, 1)), 0)
    sums += [jnp.sum(a, dtype=jnp.float32) for a in (used, scales)]
    # By axis, since a sum of ones in float32 may stay at 2^24.
    whole = x.size // math.prod(mask.size for mask in held)
    numbers = math.prod((jnp.sum(mask, dtype=jnp.float32) for mask in held), start=jnp.float32(whole))
    return jnp.stack([numbers, *sums])


def held_along(held: Array, length: int, hadamard: int) -> Array:
    """The mask `held` of an operand's places along the axis of a product's sum, for the operand as it is rounded, which
    is filled up to `length`: a transform of size `hadamard` spreads numbers over the filling beside them."""
    held = jnp.pad(held, (0, length - len(held)))
    return jnp.repeat(held.reshape(-1, hadamard).any(1), hadamard) if hadamard else held
