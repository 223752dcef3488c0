"""Grouped matrix product by XLA's own operation.

Axes: n rows, d width in, f width out, e groups.
"""

from jax import Array, lax
from jax import numpy as jnp

from orogen.parallel.target import platform


def grouped_matmul_ragged_dot(rows_nd: Array, weights_edf: Array, group_sizes: Array) -> Array:
    """See `grouped_matmul`. On CPU it is expanded to every weight times every row: correct but slow.

    Raises ValueError on a GPU, where jax expands it in the same way, which at real sizes does not fit into memory.
    """
    if platform() == "gpu":
        raise ValueError("implementation='ragged_dot' multiplies every row by every weight on a GPU: expected 'blocks'")
    # The operation leaves rows beyond the groups undefined: masked before and after, they are zero in gradients too.
    used_n1 = (jnp.arange(len(rows_nd)) < jnp.sum(group_sizes))[:, None]
    rows_nd = jnp.where(used_n1, rows_nd, 0)
    out_nf = lax.ragged_dot(rows_nd, weights_edf, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(used_n1, out_nf, 0).astype(rows_nd.dtype)
