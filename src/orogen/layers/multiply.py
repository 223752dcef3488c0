"""Products of tokens with a matrix. Letters: b batch, t time, n tokens (b · t), d width in, f width out."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.varying import vary_like


def multiply(x_btd: Array, w_df: Array) -> Array:
    """x w (b, t, f) in the compute dtype, with all axes of x but the last flattened into one.

    Otherwise the weight's gradient sums over two axes, for which XLA:CPU first transposes the whole cotangent, one
    element at a time: a layer's backward pass then takes three times as long (observed with jax 0.10.1).
    """
    # Both must vary over the same mesh axes inside shard_map. The transpose of this line sums the gradient of each over
    # the axes that only the other varies over.
    return _multiply(*vary_like((x_btd, w_df), (x_btd, w_df)))


# The gradient is written by hand, so that several products with one x save x itself instead of a flat copy each.


@jax.custom_vjp
def _multiply(x_btd: Array, w_df: Array) -> Array:
    return _forward(x_btd, w_df)[0]


def _forward(x_btd, w_df):
    return (flat(x_btd) @ w_df).reshape(*x_btd.shape[:-1], -1), (x_btd, w_df)


def _backward(kept, dy_btf):
    x_btd, w_df = kept
    dy_nf = flat(dy_btf)
    return (dy_nf @ w_df.T).reshape(x_btd.shape).astype(x_btd.dtype), (flat(x_btd).T @ dy_nf).astype(w_df.dtype)


_multiply.defvjp(_forward, _backward)


def flat(x_btd: Array) -> Array:
    """(n, d): all axes but the last flattened into one."""
    return x_btd.reshape(-1, x_btd.shape[-1])


def multiply_float32(x_btd: Array, w_df: Array) -> Array:
    """x w (b, t, f) in float32, for weights in float32. A float32 x is multiplied as usual, on a GPU in TF32.

    A bfloat16 x stays as it is, and each weight becomes the sum of three bfloat16 numbers, whose products tensor cores
    compute and sum in float32; non-finite values become NaN. Float32 operands would be rounded to TF32's 10 bits,
    after a copy of x in float32.
    """
    if x_btd.dtype != jnp.bfloat16:
        return multiply(x_btd, w_df)
    return _multiply_parts(*vary_like((x_btd, w_df), (x_btd, w_df)))


@jax.custom_vjp
def _multiply_parts(x_btd: Array, w_df: Array) -> Array:
    return _parts_forward(x_btd, w_df)[0]


def _parts_forward(x_btd, w_df):
    y_nf = _sum_of_parts(flat(x_btd), jnp.concatenate(_parts(w_df), axis=1))
    return y_nf.reshape(*x_btd.shape[:-1], -1), (x_btd, w_df)


def _parts_backward(kept, dy_btf):
    x_btd, w_df = kept
    w, dy = _parts(w_df), _parts(flat(dy_btf))
    # The omitted terms are below 2^-16 of the terms' magnitudes; rounding the gradient costs 2^-9 of them.
    dx_nd = jnp.concatenate((dy[0], dy[0], dy[1]), axis=1) @ jnp.concatenate((w[0], w[1], w[0]), axis=1).T
    dw_df = _sum_of_parts(flat(x_btd).T, jnp.concatenate(dy, axis=1))
    return dx_nd.reshape(x_btd.shape), dw_df


_multiply_parts.defvjp(_parts_forward, _parts_backward)


def _parts(x: Array) -> list[Array]:
    """Three bfloat16 arrays, the largest first, whose sum is the float32 `x`."""
    parts = []
    for _ in range(3):
        # Not by converting to bfloat16 and back, which XLA may elide.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _sum_of_parts(left: Array, right: Array) -> Array:
    """The sum, float32, of the products with three matrices that stand side by side in `right`."""
    y = jnp.matmul(left, right, preferred_element_type=jnp.float32)
    return jnp.sum(y.reshape(len(y), 3, -1), axis=1)
