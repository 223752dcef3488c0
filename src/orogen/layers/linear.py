"""Functions by which every weight is read for a product: `linear` for a matrix, `grouped` for experts, `head_matrix`.

The current layer's recipe (`Plan.recipe`) names the formats. Products that no recipe changes have functions of their
own.

Letters: b batch, t time, n tokens (b · t), d width in, f width out, e experts, r rows sorted by expert, v vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from orogen.config.recipe import FP8, IN_PLAIN, PLAIN
from orogen.kernels.grouped_matmul import grouped_matmul
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like
from orogen.precision.fp8 import fp8_matmul

# For each choice of formats, the product of rows with their expert's matrix.
GROUPED = {IN_PLAIN: grouped_matmul}


def linear(x_btd: Array, weight: nnx.Param, plan: Plan) -> Array:
    """x w, in the formats of the recipe."""
    return linears(x_btd, (weight,), plan)[0]


def linears(x_btd: Array, weights: Sequence[nnx.Param], plan: Plan) -> tuple[Array, ...]:
    """x w for each of several weights that a model could equally store as one: FP8 gives them a common scale."""
    formats, weights_df = plan.recipe.linear, [plan.weight(w) for w in weights]
    if formats == IN_PLAIN:
        return tuple(multiply(x_btd, w_df) for w_df in weights_df)
    if unknown := formats.names() - {PLAIN, FP8}:
        raise ValueError(f"a recipe names the format {sorted(unknown)[0]!r}; expected {PLAIN} or {FP8}")
    parts_nf = fp8_matmul(_flat(x_btd), weights_df, formats=formats, quantize=plan.config.quantize)
    return tuple(y_nf.reshape(*x_btd.shape[:-1], -1) for y_nf in parts_nf)


def linear_plain(x_btd: Array, weight: nnx.Param, plan: Plan) -> Array:
    """x w in the compute dtype, whatever the recipe: for results that are too narrow to gain from another format, or
    that are exponentiated into decays."""
    return multiply(x_btd, plan.weight(weight))


def linear_float32(x_btd: Array, weight: nnx.Param, plan: Plan) -> Array:
    """x w in float32, whatever the recipe, by `multiply_float32`."""
    return multiply_float32(x_btd, plan.weight(weight))


def grouped(x_rd: Array, weight: nnx.Param, group_sizes: Array | RowGroups | int, plan: Plan) -> Array:
    """x w_e for the rows of each expert e, in the formats of the recipe. group_sizes: see `grouped_matmul`."""
    product = GROUPED[plan.recipe.grouped]
    return product(x_rd, plan.weight(weight), group_sizes, implementation=plan.config.grouped_matmul)


def head_matrix(embedding: nnx.Param, head: nnx.Param | None, plan: Plan) -> Array:
    """The head (d, v of this rank) for the product in the cross-entropy; without a head, the transposed embedding. In
    the compute dtype, the only format that recipes have for it."""
    return plan.weight(embedding).T if head is None else plan.weight(head)


def multiply(x_btd: Array, w_df: Array) -> Array:
    """x w in the compute dtype, with all axes of x but the last flattened into one.

    Otherwise the weight's gradient sums over two axes, for which XLA:CPU first transposes the whole cotangent, one
    element at a time: a layer's backward pass then takes three times as long (jax 0.10.1).
    """
    # One varying type inside shard_map: the transpose of this line sums gradients over the axes that only one varies
    # over.
    return _multiply(*vary_like((x_btd, w_df), (x_btd, w_df)))


# The gradient is written by hand, so that several products with one x save x itself instead of a flat copy each.


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
    y_nf = _sum_of_parts(_flat(x_btd), jnp.concatenate(_parts(w_df), axis=1))
    return y_nf.reshape(*x_btd.shape[:-1], -1), (x_btd, w_df)


def _parts_backward(kept, dy_btf):
    x_btd, w_df = kept
    w, dy = _parts(w_df), _parts(_flat(dy_btf))
    # The omitted terms are below 2^-16 of the terms' magnitudes; rounding the gradient costs 2^-9 of them.
    dx_nd = jnp.concatenate((dy[0], dy[0], dy[1]), axis=1) @ jnp.concatenate((w[0], w[1], w[0]), axis=1).T
    dw_df = _sum_of_parts(_flat(x_btd).T, jnp.concatenate(dy, axis=1))
    return dx_nd.reshape(x_btd.shape), dw_df


_multiply_parts.defvjp(_parts_forward, _parts_backward)


def _parts(x: Array) -> list[Array]:
    """Three bfloat16 arrays whose sum is `x`, float32, the largest first."""
    parts = []
    for _ in range(3):
        # Not by converting to bfloat16 and back, which XLA may elide.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _sum_of_parts(left: Array, right: Array) -> Array:
    """The product with three matrices side by side, summed over them, float32."""
    y = jnp.matmul(left, right, preferred_element_type=jnp.float32)
    return jnp.sum(y.reshape(len(y), 3, -1), axis=1)


def _flat(x_btd: Array) -> Array:
    return x_btd.reshape(-1, x_btd.shape[-1])


def add_bias(x_btf: Array, bias: nnx.Param | None) -> Array:
    """x + bias in x's dtype; x itself if there is no bias."""
    return x_btf if bias is None else x_btf + bias[...].astype(x_btf.dtype)
