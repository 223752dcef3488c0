"""One step of each recurrence, straight from its formula: slow on a GPU; the fast versions must match it.

Axes: b batch, h heads, p head size, g groups, n state, i channels.
"""

import math

from jax import Array
from jax import numpy as jnp

from orogen.kernels.state_update.operands import Operands, SelectiveOperands
from orogen.kernels.stochastic import random_bits, to_float16


def ssm_update_reference(o: Operands) -> tuple[Array, Array]:
    """See `ssm_update`."""
    x_bhp, state_bhpn = o.x_bhp.astype(jnp.float32), o.state_bhpn.astype(jnp.float32)
    per_group = x_bhp.shape[1] // o.b_bgn.shape[1]
    b_bhn, c_bhn = (jnp.repeat(a.astype(jnp.float32), per_group, axis=1) for a in (o.b_bgn, o.c_bgn))
    decay_bh = jnp.exp(o.dt_bh * o.a_h)
    dtx_bhp = o.dt_bh[..., None] * x_bhp
    state_bhpn = decay_bh[..., None, None] * state_bhpn + dtx_bhp[..., None] * b_bhn[:, :, None]
    y_bhp = jnp.sum(state_bhpn * c_bhn[:, :, None], axis=-1) + o.skip_h[:, None] * x_bhp
    return _where_active(o, y_bhp.astype(o.x_bhp.dtype), state_bhpn, o.state_bhpn)


def selective_update_reference(o: SelectiveOperands) -> tuple[Array, Array]:
    """See `selective_update`."""
    x_bi, B_bn, C_bn = (a.astype(jnp.float32) for a in (o.x_bi, o.B_bn, o.C_bn))
    decay_bin = jnp.exp(o.dt_bi[..., None] * o.A_in)
    state_bin = decay_bin * o.state_bin.astype(jnp.float32) + (o.dt_bi * x_bi)[..., None] * B_bn[:, None]
    y_bi = jnp.sum(state_bin * C_bn[:, None], axis=-1)
    return _where_active(o, y_bi.astype(o.x_bi.dtype), state_bin, o.state_bin)


def _where_active(o: Operands | SelectiveOperands, y_b: Array, state_b: Array, old_b: Array) -> tuple[Array, Array]:
    """The outputs and the state in its stored dtype; zeros and the old state for inactive sequences."""
    of_row = lambda a: o.active_b.reshape(-1, *[1] * (a.ndim - 1))  # noqa: E731
    stored_b = rounded(state_b, o.seeds_b2)
    return jnp.where(of_row(y_b), y_b, 0), jnp.where(of_row(old_b), stored_b, old_b)


def rounded(state_b: Array, seeds_b2: Array | None) -> Array:
    """The state, rounded to float16 at random if there are seeds."""
    return state_b if seeds_b2 is None else to_float16(state_b, bits_of(state_b, seeds_b2))


def bits_of(state_b: Array, seeds_b2: Array) -> Array:
    """Random uint32 bits for the elements of a state; see `kernels.stochastic`."""
    element = jnp.arange(math.prod(state_b.shape[1:]), dtype=jnp.int32).reshape(state_b.shape[1:])
    word = lambda k: seeds_b2[:, k].reshape(-1, *[1] * element.ndim)  # noqa: E731
    return random_bits((word(0), word(1)), element)
