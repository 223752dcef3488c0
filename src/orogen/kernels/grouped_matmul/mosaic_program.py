"""One program of a Mosaic GPU kernel of the grouped matrix product: copies, products and stores of its tiles.

Both kernels have the same structure. One program per multiprocessor walks over its share of the output's tiles. One of
its warpgroups only copies: it runs ahead of the products through a ring of `stages` buffers, across tile boundaries, so
that the next tile's operands arrive while this tile's result is stored. Two warpgroups multiply, and store through
shared memory. Each takes half of every tile or, in turns, every other tile, so that one multiplies while the other
stores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from orogen.parallel.varying import kernel_index

ROWS = 128  # of the output per tile
STEP = 64  # numbers of the contracted axis per buffer: a row of 128 bytes, the widest swizzle
CHUNK = 64  # rows and columns that a warpgroup stores at once
ALIGNMENT = 8  # of rows in swizzled buffers, and so of the first row of a copy into or out of them
MULTIPLIERS, COPIER = 2, 2  # the number of warpgroups that multiply, and the index of the one that copies
COPIER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a program computes ROWS x `columns` of the output at a time: its two multiplying warpgroups halve the rows
    or, in `turns`, take every other tile. There are `stages` buffers of operands and, for each of the two, `slots`
    buffers of results. `interpret` is that of plgpu.kernel."""

    columns: int
    turns: bool
    stages: int
    slots: int
    programs: int
    interpret: Any = None

    @property
    def rows(self) -> int:
        """Rows per warpgroup."""
        return ROWS if self.turns else ROWS // MULTIPLIERS

    def first_row(self, warpgroup: Array) -> Any:
        """The first row of the warpgroup's part of the tile."""
        return 0 if self.turns else pl.multiple_of(warpgroup * self.rows, self.rows)

    def under(self, interpret: Any, programs: int) -> "Tile":
        """The same tile with other settings of how it runs."""
        return dataclasses.replace(self, interpret=interpret, programs=programs)


class Target(NamedTuple):
    """Where a tile of the result goes: its first row and column in `ref`, and the rows there to store (None: all)."""

    ref: Any
    row: Array
    column: Array
    start: Array | None = None
    stop: Array | None = None


class Work(NamedTuple):
    """The products of a tile: `count` is their number; copy(step, left_ref, right_ref, barrier) starts the copies for
    one of them; operands(step, rows, left_ref, right_ref) gives the refs to multiply for some of the tile's rows."""

    count: Array
    copy: Callable
    operands: Callable
    target: Target


class Program(NamedTuple):
    """One warpgroup of a program: the tiles of all programs, by index, and the program's buffers and barriers."""

    tile: Tile
    total: Array
    work_of: Callable[[Array], Work]
    program: Array
    warpgroup: Array
    left: Any
    right: Any
    results: Any
    produced: Any
    consumed: Any

    def each_tile(self, act: Callable[[Array, Array, Work], None]) -> Array:
        """Calls act(turn, number of products before, work) for each tile; returns the total number of products."""

        def one(number: Array, done: Array) -> Array:
            work = self.work_of(self.program + number * self.tile.programs)
            act(lax.rem(number, MULTIPLIERS), done, work)
            return done + work.count

        tiles = lax.div(self.total - self.program + self.tile.programs - 1, self.tile.programs)
        return lax.fori_loop(0, tiles, one, jnp.int32(0))

    def arrived(self, slot: Array, turn: Array) -> Any:
        """The barrier of a slot's copies. In turns each warpgroup has its own: a waiter must see all phases of one."""
        return self.produced.at[turn * self.tile.stages + slot if self.tile.turns else slot]


def run(tile: Tile, total: Array, work_of: Callable[[Array], Work], scratch: dict) -> None:
    """Computes this program's share of `total` tiles: one warpgroup copies operands, the others multiply them."""
    program = Program(tile, total, work_of, kernel_index("program"), kernel_index("warpgroup"), **scratch)
    tasks = (functools.partial(task, program) for task in (_copy_tiles, _multiply_tiles))
    lax.cond(program.warpgroup == COPIER, *tasks)


def _copy_tiles(p: Program) -> None:
    """Copies the operands of every product into the ring of buffers, as soon as a slot has been consumed."""
    stages = p.tile.stages
    plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

    def copy(turn: Array, done: Array, work: Work) -> None:
        @pl.loop(0, work.count)
        def _(step):
            slot = lax.rem(done + step, stages)

            @pl.when(done + step >= stages)
            def _():
                plgpu.barrier_wait(p.consumed.at[slot])

            work.copy(step, p.left.at[slot], p.right.at[slot], p.arrived(slot, turn))

    done = p.each_tile(copy)

    # Barriers must end in the state in which they began.
    @pl.loop(jnp.maximum(done - stages, 0), done)
    def _(step):
        plgpu.barrier_wait(p.consumed.at[lax.rem(step, stages)])


def _multiply_tiles(p: Program) -> None:
    """Multiplies and stores this warpgroup's part of every tile or, in turns, every tile that is its own."""
    plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")
    rows = pl.ds(p.tile.first_row(p.warpgroup), p.tile.rows)

    def multiply_own(turn: Array, done: Array, work: Work) -> None:
        pl.when(not p.tile.turns or turn == p.warpgroup)(functools.partial(_multiply, p, rows, done, work))

    p.each_tile(multiply_own)
    plgpu.wait_smem_to_gmem(0)


def _multiply(p: Program, rows: Any, done: Array, work: Work) -> None:
    """Sums and stores a tile's products; `done` is the number of products of the tiles before."""
    stages = p.tile.stages

    def accumulate(sum_ref) -> Array:
        @pl.loop(0, work.count)
        def _(step):
            slot = lax.rem(done + step, stages)
            plgpu.barrier_wait(p.arrived(slot, p.warpgroup))
            plgpu.wgmma(sum_ref, *work.operands(step, rows, p.left.at[slot], p.right.at[slot]))
            plgpu.wgmma_wait(1)

            # One product stays in flight; the one before it has been waited for.
            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(p.consumed.at[lax.rem(done + step - 1, stages)])

        return sum_ref[...]

    sum_ref = plgpu.WGMMAAccumulatorRef((p.tile.rows, p.tile.columns), jnp.float32)
    total_rc = pl.run_scoped(accumulate, sum_ref)

    @pl.when(work.count > 0)
    def _():
        plgpu.barrier_arrive(p.consumed.at[lax.rem(done + work.count - 1, stages)])

    _store(p.tile, total_rc, p.warpgroup, p.results, work.target)


def _store(tile: Tile, total_rc: Array, warpgroup: Array, results: Any, target: Target) -> None:
    """Stores the warpgroup's part of a tile in chunks."""
    first_row, out_ref = target.row + tile.first_row(warpgroup), target.ref
    # Whole and partial chunks share memory; each warpgroup has its own.
    whole_ref, some_ref = results
    across = range(0, tile.columns, CHUNK)
    # The last tile's stores began a tile's products ago; they may have ended on any slot.
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
        # The copy engine needs sizes known at compile time, so any number of rows is copied as a sum of powers of two.
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
