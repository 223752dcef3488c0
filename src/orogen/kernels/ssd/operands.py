"""The arrays that every implementation of the Mamba-2 recurrence takes.

Axes: b batch, t time, h heads, p head size, g groups, n state.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `ssd`; none is None, their shapes agree, and the initial state and the skip are float32."""

    x_bthp: Array
    dt_bth: Array
    a_h: Array
    b_btgn: Array
    c_btgn: Array
    segments_bt: Array
    initial_state_bhpn: Array
    skip_h: Array
