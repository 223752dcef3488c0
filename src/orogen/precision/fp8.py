"""Products of two matrices in 8-bit floating point, scaled by tensor.

Each operand is divided by a scale that brings its largest magnitude to the format's, and rounded; XLA turns the product
of the two, written as converted back and multiplied by their scales, into one FP8 call of cuBLASLt on a Hopper GPU. On
other devices the same program computes the same numbers, up to the order of sums, and gains nothing.
Forward operands are E4M3, gradients of outputs E5M2, each scaled by its current values (arXiv:2209.05433, section 3).

Letters: n tokens, d width in, f width out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.varying import vary_like

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# A tensor of zeros, or of what a float32 can hardly divide by, has this scale.
SMALLEST_SCALE = 2.0**-100
FRACTION, EXPONENT = 0x007FFFFF, 0x7F800000  # bits of a float32


def scale_of(x: Array, kind: Any) -> Array:
    """The least power of two, float32, by which `x` may be divided to fit into `kind`; NaN unless all of x is finite.

    A power of two divides without rounding, and is the same number in bfloat16.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    ratio = jnp.maximum(largest / float(jnp.finfo(kind).max), SMALLEST_SCALE)
    bits = lax.bitcast_convert_type(ratio, jnp.int32)
    power = lax.bitcast_convert_type((bits + FRACTION) & EXPONENT, jnp.float32)  # the fraction rounded up, to none
    return jnp.where(jnp.isfinite(largest), power, jnp.nan)


def quantize(x: Array, kind: Any) -> tuple[Array, Array]:
    """x / scale in `kind`, rounded to nearest, and the scale."""
    scale = scale_of(x, kind)
    # Behind a barrier: where XLA may keep excess precision it takes a conversion there and back for none, so that
    # nothing is rounded and the product is none of FP8 (seen on XLA:GPU, jax 0.11.2).
    return lax.optimization_barrier((x.astype(jnp.float32) / scale).astype(kind)), scale


def dequantize(x: Array, scale: Array, dtype: Any) -> Array:
    """x · scale in `dtype`."""
    return x.astype(dtype) * scale.astype(dtype)


@jax.custom_vjp
def fp8_matmul(x_nd: Array, w_df: Array) -> Array:
    """x w (n, f) in x's dtype, of operands rounded to E4M3; in gradients the output's is rounded to E5M2.

    An operand that is not finite everywhere makes the whole product NaN.
    """
    return _forward(x_nd, w_df)[0]


def _product(left: Array, right: Array, kinds: tuple[Any, Any], axes: tuple[int, int], dtype: Any) -> Array:
    """The product over one axis of each, both quantized; summed in float32, given in `dtype`."""
    left, right = (dequantize(*quantize(a, kind), dtype) for a, kind in zip((left, right), kinds, strict=True))
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=dtype)


def _forward(x_nd, w_df):
    x_nd, w_df = vary_like((x_nd, w_df), (x_nd, w_df))
    return _product(x_nd, w_df, (E4M3, E4M3), (1, 0), x_nd.dtype), (x_nd, w_df)


def _backward(residuals, grad_nf):
    # Operands are quantized anew: within one program XLA computes equal quantizations once, and none is stored.
    x_nd, w_df = residuals
    dx_nd = _product(grad_nf, w_df, (E5M2, E4M3), (1, 1), x_nd.dtype)
    dw_df = _product(x_nd, grad_nf, (E4M3, E5M2), (0, 0), w_df.dtype)
    return dx_nd, dw_df


fp8_matmul.defvjp(_forward, _backward)
