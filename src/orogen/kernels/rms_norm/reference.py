"""RMS norm by its formula.

Axes: n tokens, g groups, c channels (of one group, beside g).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.recompute import from_inputs
from orogen.kernels.tiny import LEAST_EPSILON, enlarged

Reduce = Callable[[Array], Array]


def rms_norm_reference(
    x_nc: Array, weight_c: Array, gate_nc: Array | None, *, group_size: int, epsilon: float, reduce_sum: Reduce | None,
    nested: bool = False,
) -> Array:  # fmt: skip
    """See `rms_norm`. The backward pass starts from the operands and, if ranks share a group, its sum of squares."""
    sizes: Any = {"group_size": group_size, "epsilon": epsilon}
    if epsilon < LEAST_EPSILON and not nested:
        return _tiny(x_nc, weight_c, gate_nc, reduce_sum=reduce_sum, **sizes)
    count = (_present(weight_c, group_size, reduce_sum),) if nested else ()
    if reduce_sum is None:
        whole = lambda x, weight, gate, *count: _normed(  # noqa: E731
            x, weight, gate, _squares(x, gate, group_size), *count, **sizes
        )
        return from_inputs(whole)(x_nc, weight_c, gate_nc, *count)
    squares_ng1 = reduce_sum(from_inputs(lambda x, gate: _squares(x, gate, group_size))(x_nc, gate_nc))
    return from_inputs(lambda *arrays: _normed(*arrays, **sizes))(x_nc, weight_c, gate_nc, squares_ng1, *count)


def _present(weight_c: Array, group_size: int, reduce_sum: Reduce | None) -> Array:
    """The number (g, 1) of channels of each group whose weight is not 0. The others are zeros, which add nothing to a
    sum of squares: what is left is what a norm over the channels that are there computes."""
    present_gc = weight_c.reshape(-1, min(group_size, len(weight_c))) != 0
    count_g1 = jnp.sum(present_gc, -1, keepdims=True, dtype=jnp.float32)
    return jnp.maximum(count_g1 if reduce_sum is None else reduce_sum(count_g1), 1)


def _tiny(
    x_nc: Array, weight_c: Array, gate_nc: Array | None, *, group_size: int, epsilon: float, reduce_sum: Reduce | None
) -> Array:
    """`rms_norm_reference` for an epsilon too small to protect tiny vectors: scales them up first."""
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
    x_nc: Array, weight_c: Array, gate_nc: Array | None, squares_ng1: Array, count_g1: Array | None = None, *,
    group_size: int, epsilon: float | Array,
) -> Array:  # fmt: skip
    mean_ng1 = squares_ng1 / (group_size if count_g1 is None else count_g1)
    normed_ngc = _gated(x_nc, gate_nc, group_size) * lax.rsqrt(mean_ng1 + epsilon)
    return (normed_ngc.reshape(x_nc.shape) * weight_c).astype(x_nc.dtype)
