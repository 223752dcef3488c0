"""Grouped matrix product, slow and obvious: every group's weight on every row, the others' rows masked.

Axes: n rows, d width in, f width out, e groups.
"""

from jax import Array
from jax import numpy as jnp


def grouped_matmul_masked(rows_nd: Array, weights_edf: Array, group_sizes: Array) -> Array:
    """See `grouped_matmul`: e times its work, so for tests."""
    ends_e = jnp.cumsum(group_sizes)
    row_n = jnp.arange(len(rows_nd))
    out_nf = jnp.zeros((len(rows_nd), weights_edf.shape[2]), jnp.float32)
    for group, weight_df in enumerate(weights_edf):
        mine_n1 = ((ends_e[group] - group_sizes[group] <= row_n) & (row_n < ends_e[group]))[:, None]
        # Masked before as well as after: zero times NaN is NaN, here and in the weight's gradient.
        product_nf = jnp.matmul(jnp.where(mine_n1, rows_nd, 0), weight_df, preferred_element_type=jnp.float32)
        out_nf = jnp.where(mine_n1, product_nf, out_nf)
    return out_nf.astype(rows_nd.dtype)
