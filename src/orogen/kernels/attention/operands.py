"""The arrays that every implementation of attention takes.

Axes: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `attention`; their shapes agree, and only the sinks may be None. The indices may have an axis b in front."""

    q_bthk: Array
    k_bsgk: Array
    v_bsgk: Array
    segments_bt: Array
    kv_segments_bs: Array
    q_index: Array
    k_index: Array
    sinks_h: Array | None
