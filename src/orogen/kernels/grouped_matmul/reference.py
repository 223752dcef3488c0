"""Grouped matrix product, slow and obvious: every group's weight times every row, with the rows of other groups masked.

Axes: n rows, d width in, f width out, e groups.
"""

from jax import Array, lax
from jax import numpy as jnp

from orogen.parallel.varying import vary_like


def grouped_matmul_masked(rows_nd: Array, weights_edf: Array, group_sizes: Array) -> Array:
    """See `grouped_matmul`: e times the work, so only for tests."""
    ends_e = jnp.cumsum(group_sizes)
    row_n = jnp.arange(len(rows_nd))

    def take(out_nf: Array, group: tuple[Array, Array, Array]) -> tuple[Array, None]:
        weight_df, end, size = group
        mine_n1 = ((end - size <= row_n) & (row_n < end))[:, None]
        # Masked before as well as after: zero times NaN is NaN, here and in the weight's gradient.
        product_nf = jnp.matmul(jnp.where(mine_n1, rows_nd, 0), weight_df, preferred_element_type=jnp.float32)
        return jnp.where(mine_n1, product_nf, out_nf), None

    # A loop instead of unrolled code: hundreds of groups take no longer to compile than one.
    out_nf = vary_like(jnp.zeros((len(rows_nd), weights_edf.shape[2]), jnp.float32), rows_nd)
    out_nf, _ = lax.scan(take, out_nf, (weights_edf, ends_e, group_sizes))
    return out_nf.astype(rows_nd.dtype)
