"""Grouped matrix product, slow and obvious: every group's weight times every row, with the rows of other groups masked.

Axes: n rows, d width in, f width out, e groups.
"""

from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.parallel.varying import vary_like


def grouped_matmul_reference(rows_nd: Array, weights_edf: Array, group_sizes: Array | RowGroups) -> Array:
    """See `grouped_matmul`: e times the work, so only for tests."""
    groups = len(weights_edf)
    if isinstance(group_sizes, RowGroups):
        group_n = group_sizes.group_r
        rows_nd = jnp.repeat(rows_nd, len(group_n) // len(rows_nd), axis=0)
    else:  # the rows beyond the last group's are those of one more
        group_n = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows_nd)), side="right")

    def take(out_nf: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        weight_df, group = one
        mine_n1 = (group_n == group)[:, None]
        # Masked before as well as after: zero times NaN is NaN, here and in the weight's gradient.
        product_nf = jnp.matmul(jnp.where(mine_n1, rows_nd, 0), weight_df, preferred_element_type=jnp.float32)
        return jnp.where(mine_n1, product_nf, out_nf), None

    # A loop instead of unrolled code: hundreds of groups take no longer to compile than one.
    out_nf = vary_like(jnp.zeros((len(rows_nd), weights_edf.shape[2]), jnp.float32), rows_nd)
    out_nf, _ = lax.scan(take, out_nf, (weights_edf, jnp.arange(groups)))
    return out_nf.astype(rows_nd.dtype)
