"""The arrays that every implementation of the Mamba-1 recurrence takes.

Axes: b batch, t time, i channels, n state.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `selective_scan`; none is None, their shapes agree, and the initial state is float32."""

    x_bti: Array
    dt_bti: Array
    A_in: Array
    B_btn: Array
    C_btn: Array
    segments_bt: Array
    initial_state_bin: Array
