"""The depthwise causal convolution, plain: one product and one sum per tap.

Axes: b batch, t time, c channels, k taps.
"""

from functools import partial

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.remade import from_inputs


def causal_conv1d_taps(
    x_btc: Array, w_ck: Array, bias_c: Array, halo_bkc: Array | None, reach_bt: Array, *, activation: str
) -> Array:
    """See `causal_conv1d`. `reach_bt`: how many tokens before each one a tap may read; weights are float32.

    The backward pass starts from the operands.
    """
    return from_inputs(partial(_convolve, activation=activation))(x_btc, w_ck, bias_c, halo_bkc, reach_bt)


def _convolve(
    x_btc: Array, w_ck: Array, bias_c: Array, halo_bkc: Array | None, reach_bt: Array, *, activation: str
) -> Array:
    time, before = x_btc.shape[1], w_ck.shape[1] - 1
    inputs_btc = jnp.pad(x_btc, ((0, 0), (before, 0), (0, 0)))
    if halo_bkc is not None:
        inputs_btc = jnp.concatenate([halo_bkc, x_btc], axis=1)
    y_btc = x_btc.astype(jnp.float32) * w_ck[:, before]
    for tap in reversed(range(before)):
        shifted_btc = inputs_btc[:, tap : tap + time].astype(jnp.float32)
        y_btc += jnp.where((reach_bt >= before - tap)[..., None], shifted_btc, 0.0) * w_ck[:, tap]
    y_btc += bias_c
    return (jax.nn.silu(y_btc) if activation == "silu" else y_btc).astype(x_btc.dtype)
