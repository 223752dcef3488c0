"""The product with a weight matrix. Letters: b batch, t time, n tokens (b · t), d width in, f width out."""

import jax
from flax import nnx
from jax import Array

from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like
from orogen.precision.fp8 import fp8_matmul


def linear(x_btd: Array, weight: nnx.Param, plan: Plan) -> Array:
    """x w, by the product that PlanConfig.linear names."""
    return PRODUCTS[plan.config.linear](x_btd, plan.weight(weight))


def multiply(x_btd: Array, w_df: Array) -> Array:
    """x w in the dtype of computation, with all axes of x but the last taken as one.

    Otherwise the weight's gradient sums over two axes, for which XLA:CPU first transposes the whole cotangent, an
    element at a time: a layer's backward pass then takes three times as long (jax 0.10.1).
    """
    # One type for both inside shard_map: the transpose of this line sums gradients over what only one varies over.
    return _multiply(*vary_like((x_btd, w_df), (x_btd, w_df)))


# The gradient is written out, so that several products with one x keep x itself and not a flat copy each.


@jax.custom_vjp
def _multiply(x_btd: Array, w_df: Array) -> Array:
    return _forward(x_btd, w_df)[0]


def _forward(x_btd, w_df):
    return (_flat(x_btd) @ w_df).reshape(*x_btd.shape[:-1], -1), (x_btd, w_df)


def _backward(kept, dy_btf):
    x_btd, w_df = kept
    dy_nf = _flat(dy_btf)
    return (dy_nf @ w_df.T).reshape(x_btd.shape).astype(x_btd.dtype), (_flat(x_btd).T @ dy_nf).astype(w_df.dtype)


_multiply.defvjp(_forward, _backward)


def _multiply_fp8(x_btd: Array, w_df: Array) -> Array:
    return fp8_matmul(_flat(x_btd), w_df).reshape(*x_btd.shape[:-1], -1)


PRODUCTS = {"plain": multiply, "fp8": _multiply_fp8}


def _flat(x_btd: Array) -> Array:
    return x_btd.reshape(-1, x_btd.shape[-1])


def add_bias(x_btf: Array, bias: nnx.Param | None) -> Array:
    """x + bias in x's dtype; x itself without one."""
    return x_btf if bias is None else x_btf + bias[...].astype(x_btf.dtype)
