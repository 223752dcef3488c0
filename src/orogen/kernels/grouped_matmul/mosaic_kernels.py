"""Mosaic GPU kernels of the grouped matrix product, for Hopper: wgmma fed by the bulk copy engine.

Axes: n rows, d width in, f width out, e groups, i blocks of rows.

Both kernels have the same form. One program per multiprocessor walks over its share of the output's tiles. One of its
warpgroups only copies: it runs ahead of the products through a ring of `stages` buffers, across the ends of tiles, so
that the next tile's operands arrive while this tile's result is stored. Two warpgroups multiply, and store through
shared memory. Each takes one half of every tile or, in turns, every other tile, so that one multiplies while the other
stores.

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

ROWS = 128  # of the output that a program works on at once
STEP = 64  # numbers of the contracted axis that one buffer holds: a row of 128 bytes, the widest swizzle
CHUNK = 64  # rows and columns that a warpgroup stores at once
ALIGNMENT = 8  # of rows in swizzled buffers, and so of the first rows of copies into and out of them
MULTIPLIERS, COPIER = 2, 2  # warpgroups that multiply, and the one after them
COPIER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a program works on ROWS x `columns` of the output at once: its two warpgroups halve the rows or, in `turns`,
    take every other tile; with `stages` buffers of operands and, for each of the two, `slots` of results. `interpret`
    is of plgpu.kernel."""

    columns: int
    turns: bool
    stages: int
    slots: int
    programs: int
    interpret: Any = None

    @property
    def rows(self) -> int:
        """Rows of one warpgroup."""
        return ROWS if self.turns else ROWS // MULTIPLIERS

    def first_row(self, warpgroup: Array) -> Any:
        """The first row of the warpgroup's part of the tile."""
        return 0 if self.turns else pl.multiple_of(warpgroup * self.rows, self.rows)

    def under(self, interpret: Any, programs: int) -> "Tile":
        """The same tile with other settings of how it runs."""
        return dataclasses.replace(self, interpret=interpret, programs=programs)


class Target(NamedTuple):
    """Where a tile of the result goes: its first row and column in `ref`, and the rows there to store, or None: all."""

    ref: Any
    row: Array
    column: Array
    start: Array | None = None
    stop: Array | None = None


class Work(NamedTuple):
    """A tile's products: their number; copy(step, left_ref, right_ref, barrier) starts the copies for one of them,
    operands(step, rows, left_ref, right_ref) gives the refs that make it for some of the tile's rows."""

    count: Array
    copy: Callable
    operands: Callable
    target: Target


class Blocks(NamedTuple):
    """int32, by block: its group, its first row, and the rows of it that are the group's; `count` (1,) are in use."""

    group_i: Array
    first_i: Array
    start_i: Array
    stop_i: Array
    count: Array


def multiply_rows(rows_nd: Array, weights_edf: Array, blocks: Blocks, *, transpose: bool, tile: Tile) -> Array:
    """Each block of rows times its group's weight, (n, f); with `transpose` rows (n, f) times its transpose, (n, d).

    Block i < count is ROWS rows from first_i on, a multiple of ALIGNMENT, of which those from start_i up to stop_i are
    stored: each row in one block. A block of group e is zeros.
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

        _run(tile, count_ref[0] * column_tiles, work, scratch)

    right = (tile.columns, STEP) if transpose else (STEP, tile.columns)
    call = _call(kernel, (len(rows_nd), out), rows_nd.dtype, (ROWS, STEP), right, tile)
    return call(rows_nd, weights_edf, *blocks)


def multiply_weights(left_nd: Array, right_nf: Array, start_e: Array, stop_e: Array, *, tile: Tile) -> Array:
    """The product (e, d, f) of each group's rows on both sides, from its start up to its stop; zeros if it is empty."""
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

        _run(tile, jnp.int32(groups * row_tiles * column_tiles), work, scratch)

    left, right = (STEP, ROWS), (STEP, tile.columns)
    call = _call(kernel, (groups, width, out), left_nd.dtype, left, right, tile)
    return call(left_nd, right_nf, start_e, stop_e)


def _keep_rows(ref, columns: int, start: Array, stop: Array) -> None:
    """Zeros the rows of `ref` (STEP, columns) before `start` and from `stop` on."""
    for column in range(0, columns, CHUNK):
        part = ref.at[:, pl.ds(column, CHUNK)]
        row = plgpu.broadcasted_iota(jnp.int32, (STEP, CHUNK), 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where((row >= start) & (row < stop), part[...].astype(jnp.float32), 0.0).astype(ref.dtype)


def _run(tile: Tile, total: Array, work_of: Callable[[Array], Work], scratch: dict) -> None:
    """This program's tiles of `total`, each by its index."""
    left_ref, right_ref, produced, consumed = (scratch[k] for k in ("left", "right", "produced", "consumed"))
    program, warpgroup = kernel_index("program"), kernel_index("warpgroup")

    def each_tile(act: Callable[[Array, Array, Work], None]) -> Array:
        """Calls act(whose turn it is, products before, work) for each tile; returns the number of all products."""

        def one(number: Array, done: Array) -> Array:
            work = work_of(program + number * tile.programs)
            act(lax.rem(number, MULTIPLIERS), done, work)
            return done + work.count

        return lax.fori_loop(0, lax.div(total - program + tile.programs - 1, tile.programs), one, jnp.int32(0))

    def arrived(slot: Array, turn: Array) -> Any:
        """The barrier of a slot's copies. In turns each warpgroup has its own: of a barrier one must see all phases."""
        return produced.at[turn * tile.stages + slot if tile.turns else slot]

    def copy_tiles() -> None:
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

        def copy(turn: Array, done: Array, work: Work) -> None:
            @pl.loop(0, work.count)
            def _(step):
                slot = lax.rem(done + step, tile.stages)

                @pl.when(done + step >= tile.stages)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                work.copy(step, left_ref.at[slot], right_ref.at[slot], arrived(slot, turn))

        done = each_tile(copy)

        # Barriers must end in the state in which they began.
        @pl.loop(jnp.maximum(done - tile.stages, 0), done)
        def _(step):
            plgpu.barrier_wait(consumed.at[lax.rem(step, tile.stages)])

    def multiply_tiles() -> None:
        plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
        rows = pl.ds(tile.first_row(warpgroup), tile.rows)

        def multiply(done: Array, work: Work) -> None:
            def accumulate(sum_ref) -> Array:
                @pl.loop(0, work.count)
                def _(step):
                    slot = lax.rem(done + step, tile.stages)
                    plgpu.barrier_wait(arrived(slot, warpgroup))
                    plgpu.wgmma(sum_ref, *work.operands(step, rows, left_ref.at[slot], right_ref.at[slot]))
                    plgpu.wgmma_wait(1)

                    # One product stays in flight; the one before it has been waited for.
                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(consumed.at[lax.rem(done + step - 1, tile.stages)])

                return sum_ref[...]

            sum_ref = plgpu.WGMMAAccumulatorRef((tile.rows, tile.columns), jnp.float32)
            total_rc = pl.run_scoped(accumulate, sum_ref)

            @pl.when(work.count > 0)
            def _():
                plgpu.barrier_arrive(consumed.at[lax.rem(done + work.count - 1, tile.stages)])

            _store(tile, total_rc, warpgroup, scratch["results"], work.target)

        def multiply_own(turn: Array, done: Array, work: Work) -> None:
            pl.when(not tile.turns or turn == warpgroup)(functools.partial(multiply, done, work))

        each_tile(multiply_own)
        plgpu.wait_smem_to_gmem(0)

    lax.cond(warpgroup == COPIER, copy_tiles, multiply_tiles)


def _store(tile: Tile, total_rc: Array, warpgroup: Array, results: Any, target: Target) -> None:
    """Stores the warpgroup's part of a tile, by chunks."""
    first_row, out_ref = target.row + tile.first_row(warpgroup), target.ref
    # Whole and partial chunks lie over each other in memory, each warpgroup's over its own.
    whole_ref, some_ref = results
    across = range(0, tile.columns, CHUNK)
    # The last tile's stores began a tile's products ago; any number of them may have ended on any slot.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def chunk(slot, row: int, column: int) -> None:
        slot[...] = total_rc[row : row + CHUNK, column : column + CHUNK].astype(out_ref.dtype)
        plgpu.commit_smem()

    def place(row: Array, length: int, column: int) -> tuple[Any, Any]:
        return pl.ds(row, length), pl.ds(pl.multiple_of(target.column + column, CHUNK), CHUNK)

    def store_whole(number: int, row: int) -> None:
        here = pl.multiple_of(first_row + row, ALIGNMENT)
        for offset, column in enumerate(across):
            slot = whole_ref.at[warpgroup, (number * len(across) + offset) % tile.slots]
            plgpu.wait_smem_to_gmem(tile.slots - 1, wait_read_only=True)
            chunk(slot, row, column)
            plgpu.copy_smem_to_gmem(slot, out_ref.at[place(here, CHUNK, column)])

    def store_some(row: int, start: Array, stop: Array) -> None:
        # The copy engine takes sizes known at compile time: each number of rows is copied as a sum of powers of two.
        slot = some_ref.at[warpgroup, 0]
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

    for number, row in enumerate(range(0, tile.rows, CHUNK)):
        if target.start is None or target.stop is None:
            store_whole(number, row)
            continue
        start, stop = (jnp.clip(bound - first_row - row, 0, CHUNK) for bound in (target.start, target.stop))
        whole = stop - start == CHUNK
        pl.when(whole)(functools.partial(store_whole, number, row))
        pl.when(~whole & (stop > start))(functools.partial(store_some, row, start, stop))


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
