"""Mosaic GPU kernels of the grouped matrix product, for Hopper: wgmma fed by the bulk copy engine.

Axes: n rows, d width in, f width out, e groups, i blocks of rows.

Their common structure is in `mosaic_program`.

Sums run in float32 in a fixed order, so results repeat to the bit and do not depend on a row's position in its block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from orogen.kernels.grouped_matmul.mosaic_program import (
    ALIGNMENT,
    CHUNK,
    MULTIPLIERS,
    ROWS,
    STEP,
    Target,
    Tile,
    Work,
    run,
)
from orogen.kernels.traced import traced_once


class Blocks(NamedTuple):
    """int32 per block: its group, its first row, and the range of rows that are the group's; `count` (1,) blocks are
    in use."""

    group_i: Array
    first_i: Array
    start_i: Array
    stop_i: Array
    count: Array


@traced_once("transpose", "tile")
def multiply_rows(rows_nd: Array, weights_edf: Array, blocks: Blocks, *, transpose: bool, tile: Tile) -> Array:
    """Each block of rows times its group's weight, (n, f); with `transpose` rows (n, f) times its transpose, (n, d).

    Block i < count has ROWS rows from first_i on, a multiple of ALIGNMENT, and stores the rows from start_i up to
    stop_i; every row is stored by one block. A block of group e, which has no weight, is zeros.
    """
    groups, width, out = weights_edf.shape
    if transpose:
        width, out = out, width
    column_tiles, steps = pl.cdiv(out, tile.columns), pl.cdiv(width, STEP)

    def kernel(rows_ref, weights_ref, group_ref, first_ref, start_ref, stop_ref, count_ref, out_ref, scratch):
        def work(index: Array) -> Work:
            block, column = lax.div(index, column_tiles), lax.rem(index, column_tiles)
            column = pl.multiple_of(column * tile.columns, tile.columns)
            group, first = group_ref[block], pl.multiple_of(first_ref[block], ALIGNMENT)

            def copy(step: Array, left_ref, right_ref, barrier) -> None:
                along, columns = pl.ds(pl.multiple_of(step * STEP, STEP), STEP), pl.ds(column, tile.columns)
                plgpu.copy_gmem_to_smem(rows_ref.at[pl.ds(first, ROWS), along], left_ref, barrier)
                weight = weights_ref.at[group]
                source = weight.at[columns, along] if transpose else weight.at[along, columns]
                plgpu.copy_gmem_to_smem(source, right_ref, barrier)

            def operands(step: Array, rows: Any, left_ref, right_ref) -> tuple[Any, Any]:
                del step
                return left_ref.at[rows, :], right_ref.transpose((1, 0)) if transpose else right_ref

            target = Target(out_ref, first, column, start_ref[block], stop_ref[block])
            return Work(jnp.where(group < groups, steps, 0), copy, operands, target)

        run(tile, count_ref[0] * column_tiles, work, scratch)

    right = (tile.columns, STEP) if transpose else (STEP, tile.columns)
    call = _call(kernel, (len(rows_nd), out), rows_nd.dtype, (ROWS, STEP), right, tile)
    return call(rows_nd, weights_edf, *blocks)


@traced_once("tile")
def multiply_weights(left_nd: Array, right_nf: Array, start_e: Array, stop_e: Array, *, tile: Tile) -> Array:
    """leftᵀ right (e, d, f) over each group's rows, from its start up to its stop; zeros if the group is empty."""
    groups, width, out = len(start_e), left_nd.shape[1], right_nf.shape[1]
    row_tiles, column_tiles = pl.cdiv(width, ROWS), pl.cdiv(out, tile.columns)

    def kernel(left_nd_ref, right_nf_ref, start_ref, stop_ref, out_ref, scratch):
        def work(index: Array) -> Work:
            group, rest = lax.div(index, row_tiles * column_tiles), lax.rem(index, row_tiles * column_tiles)
            row = pl.multiple_of(lax.div(rest, column_tiles) * ROWS, ROWS)
            column = pl.multiple_of(lax.rem(rest, column_tiles) * tile.columns, tile.columns)
            start, stop, used = start_ref[group], stop_ref[group], stop_ref[groups - 1]
            first = pl.multiple_of(lax.div(start, ALIGNMENT) * ALIGNMENT, ALIGNMENT)

            def copy(step: Array, left_ref, right_ref, barrier) -> None:
                along = pl.ds(pl.multiple_of(first + step * STEP, ALIGNMENT), STEP)
                plgpu.copy_gmem_to_smem(left_nd_ref.at[along, pl.ds(row, ROWS)], left_ref, barrier)
                plgpu.copy_gmem_to_smem(right_nf_ref.at[along, pl.ds(column, tile.columns)], right_ref, barrier)

            def operands(step: Array, rows: Any, left_ref, right_ref) -> tuple[Any, Any]:
                left_ref, here = left_ref.at[:, rows], first + step * STEP

                @pl.when((start > here) | (stop < here + STEP))
                def _():
                    _keep_rows(left_ref, tile.rows, start - here, stop - here)

                    # Rows of no group may hold anything, and zero times NaN is NaN: they are cleared on both sides.
                    # Both warpgroups of a halved tile read the right operand, and both write the same numbers to it.
                    @pl.when(here + STEP > used)
                    def _():
                        _keep_rows(right_ref, tile.columns, start - here, stop - here)

                    plgpu.commit_smem()

                return left_ref.transpose((1, 0)), right_ref

            count = jnp.where(stop > start, lax.div(stop - first + STEP - 1, STEP), 0)
            return Work(count, copy, operands, Target(out_ref.at[group], row, column))

        run(tile, jnp.int32(groups * row_tiles * column_tiles), work, scratch)

    left, right = (STEP, ROWS), (STEP, tile.columns)
    call = _call(kernel, (groups, width, out), left_nd.dtype, left, right, tile)
    return call(left_nd, right_nf, start_e, stop_e)


def _keep_rows(ref, columns: int, start: Array, stop: Array) -> None:
    """Zeros the rows of `ref` (STEP, columns) before `start` and from `stop` on."""
    for column in range(0, columns, CHUNK):
        part = ref.at[:, pl.ds(column, CHUNK)]
        row = plgpu.broadcasted_iota(jnp.int32, (STEP, CHUNK), 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where((row >= start) & (row < stop), part[...].astype(jnp.float32), 0.0).astype(ref.dtype)


def _call(
    kernel: Callable, shape: tuple[int, ...], dtype: Any, left: tuple[int, int], right: tuple[int, int], tile: Tile
) -> Callable:
    """The kernel as a function of arrays."""
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    results = (MULTIPLIERS, tile.slots, CHUNK, CHUNK)
    receivers, arrivals = (MULTIPLIERS, 1) if tile.turns else (1, MULTIPLIERS)
    scratch = {
        "left": plgpu.SMEM((tile.stages, *left), dtype, transforms=swizzled),
        "right": plgpu.SMEM((tile.stages, *right), dtype, transforms=swizzled),
        "results": plgpu.RefUnion(plgpu.SMEM(results, dtype, transforms=swizzled), plgpu.SMEM(results, dtype)),
        "produced": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages * receivers),
        "consumed": plgpu.Barrier(num_arrivals=arrivals, num_barriers=tile.stages),
    }

    def body(*refs) -> None:
        pl.run_scoped(lambda **buffers: kernel(*refs, buffers), collective_axes="warpgroup", **scratch)

    return plgpu.kernel(  # pyright: ignore[reportCallIssue] - as of jax 0.11
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(tile.programs,),
        grid_names=("program",),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        interpret=tile.interpret,
    )
