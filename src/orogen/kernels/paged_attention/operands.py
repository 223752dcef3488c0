"""The arrays that every implementation of paged attention takes.

Axes: b sequences, t new tokens, h query heads, g key heads, k head size, n pages of the pool, s tokens per page,
p pages per table.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `paged_attention`; their shapes agree, and only the sinks, which are float32, may be None."""

    q_bthk: Array
    k_nsgk: Array
    v_nsgk: Array
    table_bp: Array
    length_b: Array
    sinks_h: Array | None
