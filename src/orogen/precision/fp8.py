"""Matrix products in 8-bit floating point, with one scale per tensor.

Each operand is divided by a scale that brings its largest magnitude into the format's range, and rounded. The program
multiplies the dequantized operands; on a Hopper GPU XLA turns this into one FP8 call of cuBLASLt. On other devices the
same program computes the same numbers, up to the order of sums, and gains nothing.
Forward operands are E4M3, output gradients E5M2, each scaled by its current values (arXiv:2209.05433, section 3).

Letters: n tokens, d input width, f output width of all weights together.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from orogen.config.recipe import FP8, IN_FP8, Formats
from orogen.kernels.quantize import quantize
from orogen.parallel.varying import vary_like

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# The scale of a tensor of zeros, or of numbers too small to divide by in float32.
SMALLEST_SCALE = 2.0**-100
FRACTION, EXPONENT = 0x007FFFFF, 0x7F800000  # bits of a float32


class Rounded(NamedTuple):
    """A matrix divided by its scale, in 8 bits, as it is (`rows`) and transposed (`columns`), both row-major: FP8
    products read each operand along the contracted axis."""

    rows: Array
    columns: Array
    scale: Array


def scale_of(parts: Sequence[Array], kind: Any) -> Array:
    """The smallest power of two, float32, such that `parts` divided by it fit into `kind`; NaN unless all are finite.

    Division by a power of two does not round, and bfloat16 holds the scale exactly.
    """
    largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(part)) for part in parts)).astype(jnp.float32)
    ratio = jnp.maximum(largest / float(jnp.finfo(kind).max), SMALLEST_SCALE)
    bits = lax.bitcast_convert_type(ratio, jnp.int32)
    power = lax.bitcast_convert_type((bits + FRACTION) & EXPONENT, jnp.float32)  # rounded up to a power of two
    return jnp.where(jnp.isfinite(largest), power, jnp.nan)


def rounded(parts: Sequence[Array], kind: Any, *, implementation: str) -> Rounded:
    """`parts` side by side, rounded to `kind` by an implementation of kernels/quantize."""
    scale = checkpoint_name(scale_of(parts, kind), "fp8_scale")
    return Rounded(*quantize(parts, scale, kind, implementation=implementation), scale)


def dequantize(x: Array, scale: Array, dtype: Any) -> Array:
    """x · scale in `dtype`."""
    return x.astype(dtype) * scale.astype(dtype)


def fp8_matmul(
    x_nd: Array, weights_df: Sequence[Array], *, quantize: str, formats: Formats = IN_FP8
) -> tuple[Array, ...]:
    """x w (n, f_i) in x's dtype for each weight (d, f_i), with operands rounded to E4M3. The backward pass rounds the
    output gradients to E5M2. The weights count as columns of one matrix: they share a scale, and so do their output
    gradients.

    A single non-finite element makes every product of its operand NaN. quantize: a name of kernels/quantize.
    formats: which of the three products round their operands. Raises ValueError if the operands' dtypes differ.
    """
    if any(w_df.dtype != x_nd.dtype for w_df in weights_df):
        raise ValueError(f"weights of {[str(w.dtype) for w in weights_df]}: expected x's {x_nd.dtype}")
    return _matmul(quantize, formats, *vary_like((x_nd, tuple(weights_df)), (x_nd, weights_df)))  # pyright: ignore


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(quantize: str, formats: Formats, x_nd: Array, weights_df: tuple[Array, ...]) -> tuple[Array, ...]:
    return _forward(quantize, formats, x_nd, weights_df)[0]


def _forward(quantize, formats, x_nd, weights_df):
    x: Any = rounded((x_nd,), E4M3, implementation=quantize) if FP8 in formats.of_input else None
    w: Any = rounded(weights_df, E4M3, implementation=quantize) if FP8 in formats.of_weight else None
    if formats.forward == FP8:
        columns_fd = jnp.split(w.columns, _bounds(weights_df))
        y_nf = tuple(_product((x.rows, x.scale), (part_fd, w.scale), x_nd.dtype) for part_fd in columns_fd)
    else:
        y_nf = tuple(x_nd @ w_df for w_df in weights_df)
    # Residuals stay in 8 bits, each in the one layout that the backward pass reads.
    kept_x = (x.columns, x.scale) if formats.weight_gradient == FP8 else x_nd
    kept_w = (w.rows, w.scale) if formats.input_gradient == FP8 else jnp.concatenate(weights_df, axis=1)
    return y_nf, (kept_x, kept_w)


def _backward(quantize, formats, kept, grads_nf):
    x, w = kept
    grad: Any = rounded(grads_nf, E5M2, implementation=quantize) if FP8 in formats.of_gradient else None
    dtype = grads_nf[0].dtype
    if formats.input_gradient == FP8:
        dx_nd = _product((grad.rows, grad.scale), w, dtype)
    else:
        dx_nd = jnp.concatenate(grads_nf, axis=1) @ w.T
    if formats.weight_gradient == FP8:
        dw_df = _product(x, (grad.columns, grad.scale), dtype)
    else:
        dw_df = x.T @ jnp.concatenate(grads_nf, axis=1)
    return dx_nd, tuple(jnp.split(dw_df, _bounds(grads_nf), axis=1))


_matmul.defvjp(_forward, _backward)


def _bounds(parts: Sequence[Array]) -> list[int]:
    """The columns of the joint matrix at which the parts after the first begin."""
    return np.cumsum([part.shape[1] for part in parts])[:-1].tolist()


def _product(left: tuple[Array, Array], right: tuple[Array, Array], dtype: Any) -> Array:
    """left (m, k) times right (n, k), contracted over k, each operand with its scale; returned in `dtype`."""
    # Without this barrier XLA:GPU finds no 8-bit product (observed with jax 0.11.2): it removes round-trip conversions
    # where it may keep excess precision, splits weights after their conversion, and joins products that share x.
    operands = lax.optimization_barrier((left, right))
    left_mk, right_nk = (dequantize(values, scale, dtype) for values, scale in operands)
    return lax.dot_general(left_mk, right_nk, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
