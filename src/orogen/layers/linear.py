"""The product with a weight matrix. Letters: b batch, t time, n tokens (b · t), d width in, f width out."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.precision.fp8 import fp8_matmul

PRODUCTS = {"plain": jnp.matmul, "fp8": fp8_matmul}


def linear(x_btd: Array, w_df: Array, implementation: str = "plain") -> Array:
    """x w, by one of PRODUCTS, which PlanConfig.linear names."""
    return _flat_product(x_btd, w_df, implementation)


# Checkpointed, so that several products with one x keep x itself and not a flat copy each.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=(2,))
def _flat_product(x_btd: Array, w_df: Array, implementation: str) -> Array:
    """x w, with all axes of x but the last taken as one.

    Otherwise the weight's gradient sums over two axes, for which XLA:CPU first transposes the whole cotangent, an
    element at a time: a layer's backward pass then takes three times as long (jax 0.10.1).
    """
    y_nf = PRODUCTS[implementation](x_btd.reshape(-1, x_btd.shape[-1]), w_df)
    return y_nf.reshape(*x_btd.shape[:-1], -1)


def add_bias(x_btf: Array, bias: nnx.Param | None) -> Array:
    """x + bias in x's dtype; x itself without one."""
    return x_btf if bias is None else x_btf + bias[...].astype(x_btf.dtype)
