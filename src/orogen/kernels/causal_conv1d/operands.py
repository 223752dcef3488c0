"""The arrays that every implementation of the causal convolution takes.

Axes: b batch, t time, c channels, k taps.
"""

from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `causal_conv1d`; weights and bias are float32, a halo has x's dtype.

    reach_bt: int32, how many preceding tokens the taps of each token may read.
    """

    x_btc: Array
    w_ck: Array
    bias_c: Array
    halo_bkc: Array | None
    reach_bt: Array
