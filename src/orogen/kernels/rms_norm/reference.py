"""RMS norm as its formula says.

Axes: n tokens, g groups, c channels (of one group, beside g).
"""

from collections.abc import Callable

import jax
from jax import Array, lax
from jax import numpy as jnp

Reduce = Callable[[Array], Array]


def rms_norm_plain(
    x_nc: Array, weight_c: Array, gate_nc: Array | None, *, group_size: int, epsilon: float, reduce_sum: Reduce | None
) -> Array:
    """See `rms_norm`."""
    u_nc = x_nc.astype(jnp.float32)
    if gate_nc is not None:
        u_nc = u_nc * jax.nn.silu(gate_nc.astype(jnp.float32))
    u_ngc = u_nc.reshape(len(u_nc), -1, min(group_size, u_nc.shape[1]))
    squares_ng1 = jnp.sum(u_ngc * u_ngc, -1, keepdims=True)
    squares_ng1 = squares_ng1 if reduce_sum is None else reduce_sum(squares_ng1)
    normed_ngc = u_ngc * lax.rsqrt(squares_ng1 / group_size + epsilon)
    return (normed_ngc.reshape(u_nc.shape) * weight_c).astype(x_nc.dtype)
