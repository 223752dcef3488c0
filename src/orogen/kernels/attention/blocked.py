"""Attention in blocks of queries; the gradient recomputes the scores.

Axes: b batch, t queries, s keys, h query heads, g key heads, k head size, i blocks.
"""

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.attention.operands import Operands
from orogen.kernels.attention.reference import attention_reference

BLOCK = 64


def attention_blocked(o: Operands, *, scale: float, window: int | None, block: int = BLOCK) -> Array:
    """See `attention`: never holds more than (b, h, block, s) scores."""
    batch, queries, heads, _ = o.q_bthk.shape
    block = min(block, queries)

    def split(a: Array, axis: int) -> Array:
        pad = [(0, -queries % block if i == axis else 0) for i in range(a.ndim)]
        a = jnp.pad(a, pad).reshape(*a.shape[:axis], -1, block, *a.shape[axis + 1 :])
        return jnp.moveaxis(a, axis, 0)

    @jax.checkpoint
    def step(q_bthk, segments_bt, q_index):
        queries_of_block = o._replace(q_bthk=q_bthk, segments_bt=segments_bt, q_index=q_index)
        return attention_reference(queries_of_block, scale=scale, window=window, name=None)

    blocks = (split(o.q_bthk, 1), split(o.segments_bt, 1), split(o.q_index, o.q_index.ndim - 1))
    _, y_ibthk = lax.scan(lambda _, block: (None, step(*block)), None, blocks)
    return jnp.moveaxis(y_ibthk, 0, 1).reshape(batch, -1, heads, o.v_bsgk.shape[-1])[:, :queries]
