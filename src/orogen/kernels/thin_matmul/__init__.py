"""Products of few rows with one or several matrices, which may be stored in 8 bits, by implementation name.

Axes: n rows, d width in, f width out, g groups of neighbouring rows of a matrix.

When tokens are decoded, the matrices are all there is to read. One kernel reads all those that are multiplied by the
same rows, as the five input projections of a Mamba layer, and decodes what is stored in 8 bits as it goes.
"""

import functools
from collections.abc import Sequence

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen
from orogen.kernels.thin_matmul.operands import Matrix
from orogen.kernels.thin_matmul.reference import thin_matmul_reference
from orogen.kernels.thin_matmul.triton import takes, thin_matmul_triton
from orogen.parallel.varying import vary_like

__all__ = ["IMPLEMENTATIONS", "Matrix", "takes", "thin_matmul"]

IMPLEMENTATIONS = {
    "reference": thin_matmul_reference,
    "triton": thin_matmul_triton,
    "triton_interpreted": functools.partial(thin_matmul_triton, interpret=True),
}


def thin_matmul(rows_nd: Array, matrices: Sequence[Matrix], *, implementation: str) -> tuple[Array, ...]:
    """Rows (n, d) times each of the matrices (d, f): (n, f) each, in the rows' dtype, accumulated in float32.

    A number in E4M3 stands for the number times its scale, which `triton` applies to sums in float32: nothing is
    rounded before them. No gradients. `triton` is made for up to some dozens of rows, reads each matrix once per 64 of
    them, and needs an NVIDIA GPU, for E4M3 of compute capability 8.9 or more. On an H200 a decoding step of R1 takes
    longer with E4M3 than with bfloat16 (experiments/decode_throughput).

    Raises ValueError if shapes disagree, a matrix in E4M3 has no scales or they do not divide its rows, `triton` does
    not take it (`takes`), or the name is unknown or cannot run here.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    for matrix in matrices:
        shape, scale = matrix.values.shape, matrix.scale
        if rows_nd.ndim != 2 or len(shape) != 2 or shape[0] != rows_nd.shape[1]:
            raise ValueError(f"rows {rows_nd.shape}, matrix {shape}: expected (n, d) and (d, f)")
        in_8_bits = matrix.values.dtype == jnp.float8_e4m3fn
        if in_8_bits != (scale is not None):
            raise ValueError(f"a matrix in {matrix.values.dtype} with scales {scale}: expected them with E4M3 alone")
        if scale is not None and (scale.ndim != 2 or scale.shape[1] != shape[1] or shape[0] % scale.shape[0]):
            raise ValueError(
                f"scales {scale.shape} of a matrix {shape}: expected (g, {shape[1]}), g dividing {shape[0]}"
            )
    if not len(rows_nd):
        return tuple(jnp.zeros((0, matrix.values.shape[1]), rows_nd.dtype) for matrix in matrices)
    operands = (rows_nd, tuple(matrices))
    return run(*vary_like(operands, operands))
