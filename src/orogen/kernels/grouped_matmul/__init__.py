"""The product of each group of rows with its own weight, as experts need it, by implementation name.

Axes: n rows, d width in, f width out, e groups, r results of rows that name their groups.
"""

import functools

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen
from orogen.kernels.grouped_matmul.blocks import grouped_matmul_blocks, grouped_matmul_small_blocks
from orogen.kernels.grouped_matmul.few_rows import grouped_matmul_few_rows, scaled_few_rows
from orogen.kernels.grouped_matmul.mosaic import grouped_matmul_mosaic
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.kernels.grouped_matmul.ragged_dot import grouped_matmul_ragged_dot
from orogen.kernels.grouped_matmul.reference import grouped_matmul_reference
from orogen.kernels.thin_matmul.operands import Matrix
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "reference": grouped_matmul_reference,
    "blocks": grouped_matmul_blocks,
    "small_blocks": grouped_matmul_small_blocks,
    "ragged_dot": grouped_matmul_ragged_dot,
    "mosaic": grouped_matmul_mosaic,
    "triton_small": grouped_matmul_few_rows,
    "triton_small_interpreted": functools.partial(grouped_matmul_few_rows, interpret=True),
}
# Implementations that read weights in E4M3.
SCALED = {
    "triton_small": scaled_few_rows,
    "triton_small_interpreted": functools.partial(scaled_few_rows, interpret=True),
}
# Implementations whose rows may name their groups, and up to how many results that costs less than sorting rows: a
# weight is read for each of its results.
NAMED = {"reference": 0, "triton_small": 64, "triton_small_interpreted": 64}


def prefers_named(implementation: str, results: int) -> bool:
    """Whether rows of so few results should name their groups instead of being sorted by them."""
    return results <= NAMED.get(implementation, 0)


def grouped_matmul(
    rows_nd: Array, weights_edf: Array, group_sizes: Array | RowGroups | int, *, implementation: str
) -> Array:
    """Rows (n, f) in the rows' dtype: row i times the weight of its group, accumulated in float32.

    The rows are sorted by group. `group_sizes` is int32 (e,), each at least 0, with a sum of at most n: rows beyond
    the sum give zeros and get zero gradients, whatever they hold. If it is a Python int, every group has that many
    rows, and every implementation computes one batched product. If it is `RowGroups`, the rows name their groups, in
    any order: the results are (r, f), and the implementations those in NAMED.

    Raises ValueError if shapes or sizes disagree, the name is unknown, or the implementation cannot run here.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if rows_nd.ndim != 2 or weights_edf.ndim != 3 or rows_nd.shape[1] != weights_edf.shape[1]:
        raise ValueError(f"rows {rows_nd.shape}, weights {weights_edf.shape}: expected (n, d) and (e, d, f)")
    groups, rows = len(weights_edf), len(rows_nd)
    if isinstance(group_sizes, int):
        if rows != groups * group_sizes:
            raise ValueError(f"group_sizes={group_sizes}: expected {groups} groups to make up the {rows} rows")
        return _multiply_equal(rows_nd, weights_edf)
    _require_sizes(group_sizes, rows, groups, implementation)
    if not rows:
        return jnp.zeros((0, weights_edf.shape[2]), rows_nd.dtype)
    operands = (rows_nd, weights_edf, group_sizes)
    # One varying type inside shard_map: its transpose then sums the weights' gradient over the shards of the rows.
    return run(*vary_like(operands, operands))


def grouped_matmul_scaled(
    rows_nd: Array, weights: Matrix, group_sizes: Array | RowGroups, *, implementation: str
) -> Array:
    """`grouped_matmul` with weights (e, d, f) in E4M3, by the implementations in SCALED: products with the numbers as
    they are, summed in float32, times their scales. No gradients. `triton_small` needs a GPU of compute capability 8.9
    or more.

    Raises ValueError as it does, for weights in another dtype, and for scales that the kernel does not take
    (`thin_matmul.takes`).
    """
    run = chosen(SCALED, implementation)
    shape, scale, dtype = weights.values.shape, weights.scale, weights.values.dtype
    fits = len(shape) == 3 and rows_nd.ndim == 2 and rows_nd.shape[1] == shape[1]
    if scale is None or not fits or scale.ndim != 3 or scale.shape[::2] != shape[::2] or shape[1] % scale.shape[1]:
        beside = f"rows {rows_nd.shape}, weights {shape}, scales {None if scale is None else scale.shape}"
        raise ValueError(f"{beside}: expected (n, d), (e, d, f) and (e, g, f), g dividing d")
    if dtype != jnp.float8_e4m3fn:
        raise ValueError(f"weights with scales in {dtype}: expected float8_e4m3fn")
    _require_sizes(group_sizes, len(rows_nd), len(weights.values), implementation)
    if not len(rows_nd):
        return jnp.zeros((0, shape[2]), rows_nd.dtype)
    operands = (rows_nd, weights, group_sizes)
    return run(*vary_like(operands, operands))


def _require_sizes(group_sizes: Array | RowGroups, rows: int, groups: int, implementation: str) -> None:
    if isinstance(group_sizes, RowGroups):
        if implementation not in NAMED:
            raise ValueError(f"implementation={implementation!r}, rows that name their group: expected {list(NAMED)}")
        results = group_sizes.group_r
        if results.ndim != 1 or not rows or results.size % rows:
            raise ValueError(f"group_r has shape {results.shape}: expected (r,), a multiple of the {rows} rows")
    elif group_sizes.shape != (groups,):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}: expected {(groups,)}, one for each weight")


def _multiply_equal(rows_nd: Array, weights_edf: Array) -> Array:
    """One batched product: every group has n / e rows."""
    groups, width, out = weights_edf.shape
    # In the operands' dtype, which GPUs accumulate in float32 too: a float32 result, rounded afterwards, would have a
    # float32 cotangent, and both gradients would be products in TF32, at a third of the speed.
    out_ecf = jnp.einsum("ecd,edf->ecf", rows_nd.reshape(groups, -1, width), weights_edf)
    return out_ecf.reshape(-1, out).astype(rows_nd.dtype)
