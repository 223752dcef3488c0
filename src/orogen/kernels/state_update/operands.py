"""The arrays that every implementation of a one-token update takes.

Axes: b batch, h heads, p head size, g groups, n state, i channels.
"""

from typing import NamedTuple

from jax import Array

from orogen.kernels.state_blocks import Blocks


class Operands(NamedTuple):
    """See `ssm_update`; their shapes agree. a, dt and the skip are float32, `active_b` is bool; the seeds are uint32,
    or None for a float32 state."""

    state_bhpn: Array | Blocks
    x_bhp: Array
    dt_bh: Array
    a_h: Array
    b_bgn: Array
    c_bgn: Array
    skip_h: Array
    active_b: Array
    seeds_b2: Array | None


class SelectiveOperands(NamedTuple):
    """See `selective_update`; otherwise as `Operands`."""

    state_bin: Array | Blocks
    x_bi: Array
    dt_bi: Array
    A_in: Array
    B_bn: Array
    C_bn: Array
    active_b: Array
    seeds_b2: Array | None
