"""The arrays that every implementation of paged attention takes.

Axes: b sequences, t new tokens, h query heads, g key heads, k head size, n pages of the pool, s tokens per page,
p pages per table.
"""

from typing import Any, NamedTuple

from jax import Array
from jax import numpy as jnp


class Operands(NamedTuple):
    """See `paged_attention`; their shapes agree, and only the sinks, which are float32, may be None."""

    q_bthk: Array
    k_nsgk: Array
    v_nsgk: Array
    table_bp: Array
    length_b: Array
    sinks_h: Array | None


def decoded(x: Array, scale: float | None, dtype: Any) -> Array:
    """Numbers of a pool in `dtype`: value · scale in float32, rounded once; None: they are in it already."""
    return x if scale is None else (x.astype(jnp.float32) * scale).astype(dtype)
