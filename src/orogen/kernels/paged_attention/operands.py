"""The arrays that every implementation of paged attention takes.

Axes: b rows, t new tokens, h query heads, g key heads, k head size, n pages of the pool, s places of a page, p pages of
a row's table.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `paged_attention`; their shapes agree, and none is missing but sinks, which are float32."""

    q_bthk: Array
    k_nsgk: Array
    v_nsgk: Array
    table_bp: Array
    length_b: Array
    sinks_h: Array | None
