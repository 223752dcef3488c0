"""One step of each recurrence, straight from its formula: slow on a GPU; the fast versions must match it.

Axes: b batch, h heads, p head size, g groups, n state, i channels.
"""

import math
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.state_blocks import Blocks, encode, opened
from orogen.kernels.state_update.operands import Operands, SelectiveOperands
from orogen.kernels.stochastic import random_bits, to_float16


def ssm_update_reference(o: Operands) -> tuple[Array, Any]:
    """See `ssm_update`."""
    x_bhp, state_bhpn = o.x_bhp.astype(jnp.float32), opened(o.state_bhpn).astype(jnp.float32)
    per_group = x_bhp.shape[1] // o.b_bgn.shape[1]
    b_bhn, c_bhn = (jnp.repeat(a.astype(jnp.float32), per_group, axis=1) for a in (o.b_bgn, o.c_bgn))
    decay_bh = jnp.exp(o.dt_bh * o.a_h)
    dtx_bhp = o.dt_bh[..., None] * x_bhp
    state_bhpn = decay_bh[..., None, None] * state_bhpn + dtx_bhp[..., None] * b_bhn[:, :, None]
    y_bhp = jnp.sum(state_bhpn * c_bhn[:, :, None], axis=-1) + o.skip_h[:, None] * x_bhp
    return _where_active(o, y_bhp.astype(o.x_bhp.dtype), state_bhpn, o.state_bhpn)


def selective_update_reference(o: SelectiveOperands) -> tuple[Array, Any]:
    """See `selective_update`."""
    x_bi, B_bn, C_bn = (a.astype(jnp.float32) for a in (o.x_bi, o.B_bn, o.C_bn))
    decay_bin = jnp.exp(o.dt_bi[..., None] * o.A_in)
    state_bin = decay_bin * opened(o.state_bin).astype(jnp.float32) + (o.dt_bi * x_bi)[..., None] * B_bn[:, None]
    y_bi = jnp.sum(state_bin * C_bn[:, None], axis=-1)
    return _where_active(o, y_bi.astype(o.x_bi.dtype), state_bin, o.state_bin)


def _where_active(o: Operands | SelectiveOperands, y_b: Array, state_b: Array, old_b: Any) -> tuple[Array, Any]:
    """The outputs and the state as it is stored; zeros and the old state for inactive sequences."""
    of_row = lambda a: o.active_b.reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    if isinstance(old_b, Blocks):
        assert o.seeds_b2 is not None  # by the checks of `ssm_update`
        stored_b = encode(state_b, bits_of(state_b, o.seeds_b2))
    else:
        stored_b = rounded(state_b, o.seeds_b2)
    kept_b = jax.tree.map(lambda new, old: jnp.where(of_row(old), new, old), stored_b, old_b)
    return jnp.where(of_row(y_b), y_b, 0), kept_b


def rounded(state_b: Array, seeds_b2: Array | None) -> Array:
    """The state, rounded to float16 at random if there are seeds."""
    return state_b if seeds_b2 is None else to_float16(state_b, bits_of(state_b, seeds_b2))


def bits_of(state_b: Array, seeds_b2: Array) -> Array:
    """Random uint32 bits for the elements of a state; see `kernels.stochastic`."""
    element = jnp.arange(math.prod(state_b.shape[1:]), dtype=jnp.int32).reshape(state_b.shape[1:])
    word = lambda k: seeds_b2[:, k].reshape(-1, *[1] * element.ndim)  # noqa: E731
    return random_bits((word(0), word(1)), element)
