"""RMS norm by its formula.

Axes: n tokens, g groups, c channels (of one group, beside g).
"""

from collections.abc import Callable

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.recompute import from_inputs
from orogen.kernels.tiny import LEAST_EPSILON, enlarged

Reduce = Callable[[Array], Array]


def rms_norm_plain(
    x_nc: Array, weight_c: Array, gate_nc: Array | None, *, group_size: int, epsilon: float, reduce_sum: Reduce | None
) -> Array:
    """See `rms_norm`. The backward pass starts from the operands and, if ranks share a group, its sum of squares."""
    if epsilon < LEAST_EPSILON:
        return _tiny(x_nc, weight_c, gate_nc, group_size=group_size, epsilon=epsilon, reduce_sum=reduce_sum)
    sizes = {"group_size": group_size, "epsilon": epsilon}
    if reduce_sum is None:
        whole = lambda x, weight, gate: _normed(x, weight, gate, _squares(x, gate, group_size), **sizes)  # noqa: E731
        return from_inputs(whole)(x_nc, weight_c, gate_nc)
    squares_ng1 = reduce_sum(from_inputs(lambda x, gate: _squares(x, gate, group_size))(x_nc, gate_nc))
    return from_inputs(lambda *arrays: _normed(*arrays, **sizes))(x_nc, weight_c, gate_nc, squares_ng1)


def _tiny(
    x_nc: Array, weight_c: Array, gate_nc: Array | None, *, group_size: int, epsilon: float, reduce_sum: Reduce | None
) -> Array:
    """`rms_norm_plain` for an epsilon too small to protect tiny vectors: scales them up first."""
    total_ng1 = jnp.sum(jnp.abs(_gated(x_nc, gate_nc, group_size)), -1, keepdims=True)
    total_ng1 = total_ng1 if reduce_sum is None else reduce_sum(total_ng1)
    x_ngc, epsilon_ng1 = enlarged(_gated(x_nc, None, group_size), epsilon, total_ng1)
    larger_nc = x_ngc.reshape(x_nc.shape)
    squares_ng1 = _squares(larger_nc, gate_nc, group_size)
    squares_ng1 = squares_ng1 if reduce_sum is None else reduce_sum(squares_ng1)
    y_nc = _normed(larger_nc, weight_c, gate_nc, squares_ng1, group_size=group_size, epsilon=epsilon_ng1)
    return y_nc.astype(x_nc.dtype)


def _gated(x_nc: Array, gate_nc: Array | None, group_size: int) -> Array:
    """u (n, g, c), float32."""
    u_nc = x_nc.astype(jnp.float32)
    if gate_nc is not None:
        u_nc = u_nc * jax.nn.silu(gate_nc.astype(jnp.float32))
    return u_nc.reshape(len(u_nc), -1, min(group_size, u_nc.shape[1]))


def _squares(x_nc: Array, gate_nc: Array | None, group_size: int) -> Array:
    """The sum of squares of each group. (n, g, 1)"""
    return jnp.sum(jnp.square(_gated(x_nc, gate_nc, group_size)), -1, keepdims=True)


def _normed(
    x_nc: Array, weight_c: Array, gate_nc: Array | None, squares_ng1: Array, *, group_size: int, epsilon: float | Array
) -> Array:
    normed_ngc = _gated(x_nc, gate_nc, group_size) * lax.rsqrt(squares_ng1 / group_size + epsilon)
    return (normed_ngc.reshape(x_nc.shape) * weight_c).astype(x_nc.dtype)
