"""Products of few rows, matrix by matrix, each decoded first. Axes: n rows, d width in, f width out."""

from collections.abc import Sequence

from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.thin_matmul.operands import Matrix


def thin_matmul_reference(rows_nd: Array, matrices: Sequence[Matrix]) -> tuple[Array, ...]:
    """See `thin_matmul`; every number in float32."""

    def product(matrix: Matrix) -> Array:
        weight_df = matrix.values.astype(jnp.float32)
        if matrix.scale is not None:
            weight_df *= jnp.repeat(matrix.scale, matrix.scale_rows, axis=0)
        return jnp.matmul(rows_nd.astype(jnp.float32), weight_df, precision=lax.Precision.HIGHEST).astype(rows_nd.dtype)

    return tuple(map(product, matrices))
