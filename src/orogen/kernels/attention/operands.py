"""The arrays that every implementation of attention takes.

Axes: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `attention`; their shapes agree, and none is missing but sinks. Indices have an axis b or not."""

    q_bthk: Array
    k_bsgk: Array
    v_bsgk: Array
    segments_bt: Array
    kv_segments_bs: Array
    q_index: Array
    k_index: Array
    sinks_h: Array | None
