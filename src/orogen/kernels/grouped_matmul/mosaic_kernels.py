"""Mosaic GPU kernels of the grouped matrix product, for Hopper: wgmma fed by the bulk copy engine.

Axes: n rows, d width in, f width out, e groups, i blocks of rows.

Both kernels have the same form. One program a multiprocessor walks over its share of the output's tiles. One of its
warpgroups does nothing but copy: it runs ahead of the products through a ring of `stages` buffers, over the ends of
tiles too, so that the next tile's operands arrive while this one's result is stored. Two warpgroups multiply, each a
half of the tile, and store their half through shared memory.

Sums run in one order, in float32, so results repeat to the bit, and do not depend on where a row lies in a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from orogen.parallel.varying import kernel_index

STEP = 64  # numbers of the contracted axis that one buffer holds: a row of 128 bytes, the widest swizzle
CHUNK = 64  # rows and columns that a warpgroup stores at once
ALIGNMENT = 8  # of rows in swizzled buffers, and so of the rows that copies into and out of them begin with
MULTIPLIERS, COPIER = 2, 2  # warpgroups that multiply, and the one after them
COPIER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a program works: `rows` x `columns` of the output at once, halved between two warpgroups along `split` (0
    rows, 1 columns), with `stages` buffers of operands and `slots` of results. `interpret` is of plgpu.kernel."""

    rows: int
    columns: int
    split: int
    stages: int
    slots: int
    programs: int
    interpret: Any = None

    @property
    def half(self) -> tuple[int, int]:
        """Rows and columns of one warpgroup."""
        return (self.rows // 2, self.columns) if self.split == 0 else (self.rows, self.columns // 2)

    def under(self, interpret: Any, programs: int) -> "Tile":
        """The same, run so."""
        return dataclasses.replace(self, interpret=interpret, programs=programs)

    def part(self, warpgroup: Array) -> tuple[Any, Any]:
        """The warpgroup's rows and columns of the tile."""
        rows, columns = self.half
        if self.split == 0:
            return pl.ds(pl.multiple_of(warpgroup * rows, rows), rows), pl.ds(0, columns)
        return pl.ds(0, rows), pl.ds(pl.multiple_of(warpgroup * columns, columns), columns)


class Target(NamedTuple):
    """Where a tile of the result goes: its first row and column in `ref`, and the rows there to store, or None: all."""

    ref: Any
    row: Array
    column: Array
    start: Array | None = None
    stop: Array | None = None


def multiply_rows(
    rows_nd: Array,
    weights_edf: Array,
    group_i: Array,
    first_i: Array,
    start_i: Array,
    stop_i: Array,
    count: Array,
    *,
    transpose: bool,
    tile: Tile,
) -> Array:
    """Each block of rows times its group's weight, (n, f); with `transpose` rows (n, f) times its transpose, (n, d).

    Block i < count is tile.rows rows from first_i on, a multiple of ALIGNMENT, of which those from start_i up to stop_i
    are stored: each row in one block. A block of group e is zeros.
    """
    groups, width, out = weights_edf.shape
    if transpose:
        width, out = out, width
    column_tiles, steps = pl.cdiv(out, tile.columns), pl.cdiv(width, STEP)

    def kernel(rows_ref, weights_ref, group_ref, first_ref, start_ref, stop_ref, count_ref, out_ref, scratch):
        def place(index: Array) -> tuple[Array, Array, Array]:
            block, column = lax.div(index, column_tiles), lax.rem(index, column_tiles)
            group = group_ref[block]
            return block, pl.multiple_of(column * tile.columns, tile.columns), jnp.where(group < groups, steps, 0)

        def copy(index: Array, step: Array, left_ref, right_ref, barrier) -> None:
            block, column, _ = place(index)
            along, columns = pl.ds(pl.multiple_of(step * STEP, STEP), STEP), pl.ds(column, tile.columns)
            rows = pl.ds(pl.multiple_of(first_ref[block], ALIGNMENT), tile.rows)
            plgpu.copy_gmem_to_smem(rows_ref.at[rows, along], left_ref, barrier)
            weight = weights_ref.at[group_ref[block]]
            source = weight.at[columns, along] if transpose else weight.at[along, columns]
            plgpu.copy_gmem_to_smem(source, right_ref, barrier)

        def operands(index: Array, step: Array, warpgroup: Array, left_ref, right_ref) -> tuple[Any, Any]:
            rows, columns = tile.part(warpgroup)
            if transpose:
                return left_ref.at[rows, :], right_ref.at[columns, :].transpose((1, 0))
            return left_ref.at[rows, :], right_ref.at[:, columns]

        def target(index: Array) -> Target:
            block, column, _ = place(index)
            return Target(out_ref, first_ref[block], column, start_ref[block], stop_ref[block])

        total = count_ref[0] * column_tiles
        _run(tile, total, lambda index: place(index)[2], copy, operands, target, scratch)

    right = (tile.columns, STEP) if transpose else (STEP, tile.columns)
    call = _call(kernel, (len(rows_nd), out), rows_nd.dtype, (tile.rows, STEP), right, tile, partial_rows=True)
    return call(rows_nd, weights_edf, group_i, first_i, start_i, stop_i, count)


def multiply_weights(left_nd: Array, right_nf: Array, start_e: Array, stop_e: Array, *, tile: Tile) -> Array:
    """The product (e, d, f) of each group's rows on both sides, from its start up to its stop; zeros if it is empty."""
    width, out = left_nd.shape[1], right_nf.shape[1]
    row_tiles, column_tiles = pl.cdiv(width, tile.rows), pl.cdiv(out, tile.columns)

    def kernel(left_nd_ref, right_nf_ref, start_ref, stop_ref, out_ref, scratch):
        def place(index: Array) -> tuple[Array, Array, Array]:
            group, rest = lax.div(index, row_tiles * column_tiles), lax.rem(index, row_tiles * column_tiles)
            row, column = lax.div(rest, column_tiles) * tile.rows, lax.rem(rest, column_tiles) * tile.columns
            return group, pl.multiple_of(row, tile.rows), pl.multiple_of(column, tile.columns)

        def first_row(group: Array) -> Array:
            return pl.multiple_of(lax.div(start_ref[group], ALIGNMENT) * ALIGNMENT, ALIGNMENT)

        def steps(index: Array) -> Array:
            group = place(index)[0]
            rows = stop_ref[group] - first_row(group) + STEP - 1
            return jnp.where(stop_ref[group] > start_ref[group], lax.div(rows, STEP), 0)

        def copy(index: Array, step: Array, left_ref, right_ref, barrier) -> None:
            group, row, column = place(index)
            along = pl.ds(pl.multiple_of(first_row(group) + step * STEP, ALIGNMENT), STEP)
            plgpu.copy_gmem_to_smem(left_nd_ref.at[along, pl.ds(row, tile.rows)], left_ref, barrier)
            plgpu.copy_gmem_to_smem(right_nf_ref.at[along, pl.ds(column, tile.columns)], right_ref, barrier)

        def operands(index: Array, step: Array, warpgroup: Array, left_ref, right_ref) -> tuple[Any, Any]:
            rows, columns = tile.part(warpgroup)
            left_ref, right_ref = left_ref.at[:, rows], right_ref.at[:, columns]
            group = place(index)[0]
            here = first_row(group) + step * STEP
            start, stop = start_ref[group] - here, stop_ref[group] - here

            @pl.when((start > 0) | (stop < STEP))
            def _():
                # A side that both warpgroups read is written by both, with the same numbers.
                _keep_rows(left_ref, tile.half[0], start, stop)

                # Rows of no group may hold anything, and zero times NaN is NaN: those are cleared on both sides.
                @pl.when(here + STEP > stop_ref[len(start_e) - 1])
                def _():
                    _keep_rows(right_ref, tile.half[1], start, stop)

                plgpu.commit_smem()

            return left_ref.transpose((1, 0)), right_ref

        def target(index: Array) -> Target:
            group, row, column = place(index)
            return Target(out_ref.at[group], row, column)

        total = jnp.int32(len(start_e) * row_tiles * column_tiles)
        _run(tile, total, steps, copy, operands, target, scratch)

    shape = (len(start_e), width, out)
    call = _call(kernel, shape, left_nd.dtype, (STEP, tile.rows), (STEP, tile.columns), tile, partial_rows=False)
    return call(left_nd, right_nf, start_e, stop_e)


def _keep_rows(ref, columns: int, start: Array, stop: Array) -> None:
    """Zeros the rows of `ref` (STEP, columns) before `start` and from `stop` on."""
    for column in range(0, columns, CHUNK):
        part = ref.at[:, pl.ds(column, CHUNK)]
        row = plgpu.broadcasted_iota(jnp.int32, (STEP, CHUNK), 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where((row >= start) & (row < stop), part[...].astype(jnp.float32), 0.0).astype(ref.dtype)


def _run(
    tile: Tile, total: Array, steps: Callable, copy: Callable, operands: Callable, target: Callable, scratch: dict
) -> None:
    """This program's tiles of `total`. By the tile's index: steps() counts its products, copy() starts one's copies,
    operands() are the refs that this warpgroup multiplies, target() says where the result goes."""
    left_ref, right_ref, produced, consumed = (scratch[k] for k in ("left", "right", "produced", "consumed"))
    program, warpgroup = kernel_index("program"), kernel_index("warpgroup")
    tiles = lax.div(total - program + tile.programs - 1, tile.programs)

    def copy_tiles() -> None:
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

        def one(number: Array, done: Array) -> Array:
            index = program + number * tile.programs
            count = steps(index)

            @pl.loop(0, count)
            def _(step):
                slot = lax.rem(done + step, tile.stages)

                @pl.when(done + step >= tile.stages)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                copy(index, step, left_ref.at[slot], right_ref.at[slot], produced.at[slot])

            return done + count

        done = lax.fori_loop(0, tiles, one, jnp.int32(0))

        # Barriers must be left as they were found.
        @pl.loop(jnp.maximum(done - tile.stages, 0), done)
        def _(step):
            plgpu.barrier_wait(consumed.at[lax.rem(step, tile.stages)])

    def multiply_tiles() -> None:
        plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")

        def one(number: Array, done: Array) -> Array:
            index = program + number * tile.programs
            count = steps(index)

            def accumulate(sum_ref) -> Array:
                @pl.loop(0, count)
                def _(step):
                    slot = lax.rem(done + step, tile.stages)
                    plgpu.barrier_wait(produced.at[slot])
                    left, right = operands(index, step, warpgroup, left_ref.at[slot], right_ref.at[slot])
                    plgpu.wgmma(sum_ref, left, right)
                    plgpu.wgmma_wait(1)

                    # One product stays under way; the one before has been waited for.
                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(consumed.at[lax.rem(done + step - 1, tile.stages)])

                return sum_ref[...]

            total_rc = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(tile.half, jnp.float32))

            @pl.when(count > 0)
            def _():
                plgpu.barrier_arrive(consumed.at[lax.rem(done + count - 1, tile.stages)])

            _store(tile, total_rc, warpgroup, scratch, target(index))
            return done + count

        lax.fori_loop(0, tiles, one, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == COPIER, copy_tiles, multiply_tiles)


def _store(tile: Tile, total_rc: Array, warpgroup: Array, scratch: dict, target: Target) -> None:
    """Stores the warpgroup's half, by chunks."""
    rows, columns = tile.half
    first_row = target.row + (warpgroup * rows if tile.split == 0 else 0)
    first_column = target.column + (warpgroup * columns if tile.split == 1 else 0)
    slots, out_ref = scratch["whole"].at[warpgroup], target.ref
    across = range(0, columns, CHUNK)
    # The last tile's stores began a tile's products ago; any number of them may have ended on any slot.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def chunk(slot, row: int, column: int) -> None:
        slot[...] = total_rc[row : row + CHUNK, column : column + CHUNK].astype(out_ref.dtype)
        plgpu.commit_smem()

    def place(row: Array, length: int, column: int) -> tuple[Any, Any]:
        return pl.ds(row, length), pl.ds(pl.multiple_of(first_column + column, CHUNK), CHUNK)

    def store_whole(number: int, row: int) -> None:
        here = pl.multiple_of(first_row + row, ALIGNMENT)
        for offset, column in enumerate(across):
            slot = slots.at[(number * len(across) + offset) % tile.slots]
            plgpu.wait_smem_to_gmem(tile.slots - 1, wait_read_only=True)
            chunk(slot, row, column)
            plgpu.copy_smem_to_gmem(slot, out_ref.at[place(here, CHUNK, column)])

    def store_some(row: int, start: Array, stop: Array) -> None:
        # The copy engine takes sizes known at compile time: powers of two, of which each number of rows is a sum.
        slot = scratch["some"].at[warpgroup]
        for column in across:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            chunk(slot, row, column)
            at, length = start, CHUNK // 2
            while length:
                taken = (stop - start) & length

                @pl.when(taken != 0)
                def _(at=at, length=length, column=column):
                    target_ref = out_ref.at[place(first_row + row + at, length, column)]
                    plgpu.copy_smem_to_gmem(slot.at[pl.ds(at, length)], target_ref)

                at += taken
                length //= 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    for number, row in enumerate(range(0, rows, CHUNK)):
        if target.start is None or target.stop is None:
            store_whole(number, row)
            continue
        start, stop = (jnp.clip(bound - first_row - row, 0, CHUNK) for bound in (target.start, target.stop))
        whole = stop - start == CHUNK
        pl.when(whole)(functools.partial(store_whole, number, row))
        pl.when(~whole & (stop > start))(functools.partial(store_some, row, start, stop))


def _call(
    kernel: Callable, shape: tuple[int, ...], dtype: Any, left: tuple[int, int], right: tuple[int, int], tile: Tile,
    *, partial_rows: bool,
) -> Callable:  # fmt: skip
    """The kernel as a function of arrays. partial_rows: results may be stored in part."""
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    scratch = {
        "left": plgpu.SMEM((tile.stages, *left), dtype, transforms=swizzled),
        "right": plgpu.SMEM((tile.stages, *right), dtype, transforms=swizzled),
        "whole": plgpu.SMEM((MULTIPLIERS, tile.slots, CHUNK, CHUNK), dtype, transforms=swizzled),
        "produced": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        "consumed": plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=tile.stages),
    }
    if partial_rows:
        scratch["some"] = plgpu.SMEM((MULTIPLIERS, CHUNK, CHUNK), dtype)

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
