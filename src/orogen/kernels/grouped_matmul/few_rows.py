"""Grouped matrix product for few rows in one Triton kernel, for NVIDIA GPUs: made to read weights as fast as they come.

Axes: n rows, d width in, f width out, e groups, i blocks of rows, r rows of a block.

When tokens are decoded, an expert has a row or some dozens, and its weights are all there is to read. A group is split
into blocks of at most r rows, as few as the hardware multiplies, or as many as a group has on average; so the weights
of each group that has rows are read once, or again from the cache by the blocks beside it, and those of others never.
Results that name their group are a block each: up to some dozens, sorting their rows would take longer.

Tiling: the grid is (blocks, blocks of columns, splits of d). A program of sorted rows finds its group in the table of
sizes by itself, since a kernel that prepared that would take as long as the product; it holds r rows of its columns in
registers and walks over its split of d. With few blocks, d is split until the programs keep every multiprocessor
loading; what reads the product adds the splits up, always in the same order. Rows of no group are blocks of one more
group, whose walk has no step. Weights in E4M3 are multiplied as they are, exactly: a tile of d has one scale per
column, which multiplies the tile's sums.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.grouped_matmul.blocks import grouped_matmul_blocks
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.kernels.grouped_matmul.reference import grouped_matmul_reference
from orogen.kernels.pallas_triton import SMALLEST_TILE, both, call, dot, inside, load, require_gpu, store, tile
from orogen.kernels.thin_matmul.operands import Matrix
from orogen.kernels.thin_matmul.triton import require_taken

PROGRAMS = 264  # wanted: two on each multiprocessor of an H100
FILLED = 8  # one row in so many is expected to have a group: the others belong to slots without a request
MOST_ROWS = 64  # of a block
COLUMNS = 128  # of a program: 256 contiguous bytes of a row of weights
SPLITS = (1, 2, 4)  # of d
TILE = 2**14  # bytes of the weights that are taken at once
WARPS, STAGES = 4, 4


class Launch(NamedTuple):
    """Tile sizes: rows and columns of a program, and how much of d it takes at once. splits: parts into which d is
    divided. blocks: as many as there may be. results_per_row: 0, or how many results in turn, each of a group that it
    names, have one row.

    sizes: of d, f, e and the results. scale_rows: how much of d has the same scales; 0: there are none.
    """

    rows: int
    columns: int
    depth: int
    splits: int
    blocks: int
    results_per_row: int
    sizes: tuple[int, int, int, int]
    scale_rows: int = 0


def grouped_matmul_few_rows(
    rows_nd: Array, weights_edf: Array, group_sizes: Array | RowGroups, *, interpret: bool = False
) -> Array:
    """`grouped_matmul` on an NVIDIA GPU, for up to some dozens of rows per group; right, but slow, with more.

    `interpret` runs the same kernel anywhere, slowly. Its gradients are those of `blocks`, and of the reference where
    rows name their groups. Raises ValueError if there is no GPU and `interpret` is False.
    """
    require_gpu(interpret=interpret, implementation="triton_small")
    return _multiply(rows_nd, weights_edf, group_sizes, interpret)  # pyright: ignore[reportReturnType]


def scaled_few_rows(
    rows_nd: Array, weights: Matrix, group_sizes: Array | RowGroups, *, interpret: bool = False
) -> Array:
    """The same with weights (e, d, f) in E4M3; no gradients. Raises ValueError for a GPU that cannot convert E4M3, too,
    and for scales that the kernel does not take (`thin_matmul.takes`)."""
    require_gpu(interpret=interpret, implementation="triton_small", e4m3=True)
    require_taken(weights)
    return _product(rows_nd, weights, group_sizes, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(rows_nd: Array, weights_edf: Array, group_sizes: Array, interpret: bool) -> Array:
    return _product(rows_nd, Matrix(weights_edf), group_sizes, interpret=interpret)


def _forward(rows_nd, weights_edf, group_sizes, interpret):
    return _product(rows_nd, Matrix(weights_edf), group_sizes, interpret=interpret), (rows_nd, weights_edf, group_sizes)


def _product(rows_nd: Array, weights: Matrix, group_sizes: Array | RowGroups, *, interpret: bool) -> Array:
    named = isinstance(group_sizes, RowGroups)
    results = len(group_sizes.group_r) if named else None
    launch = choose_launch(rows_nd, weights.values, results, 0 if weights.scale is None else weights.scale_rows)
    width, out, groups, rows = launch.sizes
    padded_d = pl.cdiv(width, launch.depth) * launch.depth
    kind = rows_nd.dtype if launch.splits == 1 else jnp.float32
    table = group_sizes.group_r if isinstance(group_sizes, RowGroups) else group_sizes
    # A program of a result that names its group reads that number; one of sorted rows reads the whole table of sizes.
    table_spec = pl.BlockSpec((None,), lambda i, f, s: (i,))
    if not named:
        table_spec = pl.BlockSpec((pl.next_power_of_2(groups + 1),), lambda i, f, s: (0,))
    out_spec = pl.BlockSpec((None, rows, launch.columns), lambda i, f, s: (s, 0, f))
    of_groups = lambda deep: pl.BlockSpec((groups, deep, launch.columns), lambda i, f, s: (0, 0, f))  # noqa: E731
    operands = [rows_nd, weights.values, table.astype(jnp.int32)]
    specs = [pl.BlockSpec((len(rows_nd), padded_d), lambda i, f, s: (0, 0)), of_groups(padded_d), table_spec]
    if weights.scale is not None:
        operands.append(weights.scale)
        specs.append(of_groups(weights.scale.shape[1]))
    parts = call(
        functools.partial(_kernel, launch=launch), operands, specs,
        {"out": ((launch.splits, rows, out), kind, out_spec)},
        grid=(launch.blocks, pl.cdiv(out, launch.columns), launch.splits),
        warps=WARPS, stages=STAGES, interpret=interpret,
    )  # fmt: skip
    # XLA fuses these sums into what reads the product; a reduction would be a kernel of its own.
    return functools.reduce(jnp.add, parts["out"]).astype(rows_nd.dtype)


def _backward(interpret, residuals, grad_nf):
    del interpret
    rows_nd, weights_edf, group_sizes = residuals
    product: Any = grouped_matmul_reference if isinstance(group_sizes, RowGroups) else grouped_matmul_blocks
    run = lambda rows_nd, weights_edf: product(rows_nd, weights_edf, group_sizes)  # noqa: E731
    return *jax.vjp(run, rows_nd, weights_edf)[1](grad_nf), None


_multiply.defvjp(_forward, _backward)


def choose_launch(rows_nd: Array, weights_edf: Array, results: int | None = None, scale_rows: int = 0) -> Launch:
    """Tile sizes for these shapes. results: how many there are if each names its group; None: rows are sorted.
    scale_rows: as of `Launch`."""
    groups, width, out = weights_edf.shape
    rows, results_per_row = len(rows_nd), 0
    block = min(tile(pl.cdiv(rows, groups)), MOST_ROWS)
    blocks = min(rows, rows // block + groups + 1)
    if results is not None:
        rows, results_per_row, block, blocks = results, results // rows, SMALLEST_TILE, results
    columns = min(tile(out), COLUMNS)
    depth = min(max(SMALLEST_TILE, TILE // (columns * weights_edf.dtype.itemsize)), tile(width))
    if 0 < scale_rows < width:
        depth = math.gcd(scale_rows, depth)
    filled = min(groups, pl.cdiv(rows, FILLED)) * pl.cdiv(out, columns)  # programs of one split that have work
    enough = [splits for splits in SPLITS if filled * splits >= PROGRAMS]
    splits = min(enough[0] if enough else SPLITS[-1], pl.next_power_of_2(pl.cdiv(width, depth)))
    return Launch(block, columns, depth, splits, blocks, results_per_row, (width, out, groups, rows), scale_rows)


def _block(sizes_ref, launch: Launch) -> tuple[Array, Array, Array]:
    """The program's group, its first row and the one after its last: the same if there is nothing to do."""
    *_, groups, rows = launch.sizes
    group_e = jnp.arange(sizes_ref.shape[0])
    sizes_e = load(sizes_ref, group_e < groups)
    sizes_e = jnp.where(group_e == groups, rows - jnp.sum(sizes_e), sizes_e)  # the rows of no group
    blocks_e = lax.div(sizes_e + launch.rows - 1, launch.rows)
    ends_e, last_e = jnp.cumsum(sizes_e), jnp.cumsum(blocks_e)
    number = pl.program_id(0)
    group = jnp.sum((last_e <= number).astype(jnp.int32))
    of_group = lambda array_e: jnp.sum(jnp.where(group_e == group, array_e, 0))  # noqa: E731
    end = of_group(ends_e)
    start = end - of_group(sizes_e) + (number - of_group(last_e - blocks_e)) * launch.rows
    exists = group <= groups
    return group, jnp.where(exists, start, 0), jnp.where(exists, jnp.minimum(start + launch.rows, end), 0)


def _kernel(rows_ref, weights_ref, table_ref, *refs, launch: Launch):
    (*scale_ref, out_ref), (width, out, groups, _) = refs, launch.sizes
    if launch.results_per_row:
        number = pl.program_id(0)
        group, start, stop, first_row = table_ref[...], number, number + 1, lax.div(number, launch.results_per_row)
    else:
        group, start, stop = _block(table_ref, launch)
        first_row = start
    here_r, out_r = pl.ds(first_row, launch.rows), pl.ds(start, launch.rows)
    in_r = start + jnp.arange(launch.rows) < stop
    in_f = inside(pl.program_id(1) * launch.columns + jnp.arange(launch.columns), out, launch.columns)
    used = jnp.minimum(group, groups - 1)
    kind = rows_ref.dtype if scale_ref else jnp.promote_types(rows_ref.dtype, weights_ref.dtype)

    def step(number: Array, sum_rf: Array) -> Array:
        first = number * launch.depth
        in_d = inside(first + jnp.arange(launch.depth), width, launch.depth)
        here_d = pl.ds(first, launch.depth)
        rows_rd = load(rows_ref.at[here_r, here_d], both(in_r, in_d))
        weight_df = load(weights_ref.at[used, here_d, :], both(in_d, in_f))
        product_rf = dot(rows_rd.astype(kind), weight_df.astype(kind), 1, 0)
        if scale_ref:
            product_rf *= load(scale_ref[0].at[used, lax.div(first, launch.scale_rows), :], in_f)[None, :]
        return sum_rf + product_rf

    every = pl.cdiv(width, launch.depth)
    per_split = pl.cdiv(every, launch.splits)
    first = pl.program_id(2) * per_split
    # Not by `where` of two Python numbers, which Pallas lowers to a boolean for Triton.
    last = first + (group < groups).astype(jnp.int32) * jnp.clip(every - first, 0, per_split)
    sum_rf = lax.fori_loop(first, last, step, jnp.zeros((launch.rows, launch.columns), jnp.float32))
    store(out_ref.at[out_r, :], sum_rf, both(in_r, in_f))
