"""The depthwise causal convolution, plain: one product and one sum per tap.

Axes: b batch, t time, c channels, k taps.
"""

from functools import partial

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.causal_conv1d.operands import Operands
from orogen.kernels.recompute import from_inputs


def causal_conv1d_reference(o: Operands, *, activation: str) -> Array:
    """See `causal_conv1d`. Only the operands are saved for the backward pass."""
    return from_inputs(partial(_convolve, activation=activation))(o)


def _convolve(o: Operands, *, activation: str) -> Array:
    time, before = o.x_btc.shape[1], o.w_ck.shape[1] - 1
    inputs_btc = jnp.pad(o.x_btc, ((0, 0), (before, 0), (0, 0)))
    if o.halo_bkc is not None:
        inputs_btc = jnp.concatenate([o.halo_bkc, o.x_btc], axis=1)
    y_btc = o.x_btc.astype(jnp.float32) * o.w_ck[:, before]
    for tap in reversed(range(before)):
        shifted_btc = inputs_btc[:, tap : tap + time].astype(jnp.float32)
        y_btc += jnp.where((o.reach_bt >= before - tap)[..., None], shifted_btc, 0.0) * o.w_ck[:, tap]
    y_btc += o.bias_c
    return (jax.nn.silu(y_btc) if activation == "silu" else y_btc).astype(o.x_btc.dtype)
