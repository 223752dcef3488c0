"""Random words for stochastic rounding.

They are functions of the run's seed, the step, the layer, the operand, and the place of a number in the whole tensor.
So every plan, every microbatch and every recomputation draws the same ones.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.kernels.stochastic import mix


def step_key(seed: int, step: Array | int) -> Array:
    """The uint32 key of a step."""
    return mix(mix(jnp.asarray(step).astype(jnp.uint32) + np.uint32(0x9E3779B9)) ^ mix_number(seed))


def mix_number(number: int) -> Array:
    """A word from a whole number."""
    return mix(jnp.asarray(np.uint32(number)) + np.uint32(0x85EBCA6B))


def operand_key(key: Array, layer: Array, name: int) -> Array:
    """The key of one operand of one layer. name: its own number among the operands of a layer."""
    return mix(key ^ mix(layer.astype(jnp.uint32) * np.uint32(1 << 16) + np.uint32(name)))


def words(key: Array, rows: Array, columns: Array) -> Array:
    """A word per number, of shape rows.shape + columns.shape, from the places of its row and column in the tensor."""
    row = mix(key ^ mix(rows.astype(jnp.uint32)))
    column = mix(columns.astype(jnp.uint32) + np.uint32(0xC2B2AE35))
    return mix(row[..., None] + column)


def columns(offset: Array, count: int) -> Array:
    """The places of this rank's columns, which begin at `offset`."""
    return offset.astype(jnp.uint32) + jnp.arange(count, dtype=jnp.uint32)
