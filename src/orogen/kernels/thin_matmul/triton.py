"""Products of few rows with several matrices in one Triton kernel, for NVIDIA GPUs: weights are read once, all at once.

Axes: n rows, d width in, f width out, g groups of neighbouring rows, r rows of a program.

Tiling: the grid is (blocks of columns of all matrices, splits of d, blocks of rows). The blocks of the matrices are
numbered one matrix after the other, and a program runs the branch of the matrix that its number falls into. It holds r
rows of its columns in registers and walks over its split of d. d is split until the programs keep every multiprocessor
loading; what reads a product adds the splits up, always in the same order. Numbers in E4M3 are multiplied as they are,
exactly: a tile of d has one scale per column, which multiplies the tile's sums.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import SMALLEST_TILE, both, call, dot, inside, load, require_gpu, store, tile
from orogen.kernels.thin_matmul.operands import Matrix

PROGRAMS = 264  # wanted: two on each multiprocessor of an H100
MOST_ROWS = 64  # of a program
COLUMNS = 128  # of a program
SPLITS = (1, 2, 4, 8, 16)  # of d
TILE = 2**14  # bytes of the weights that are taken at once
WARPS, STAGES = 4, 4


class Part(NamedTuple):
    """One matrix's share of the programs. out: its columns. first: the number of its first block of columns. depth: how
    much of d a program takes at once. scale_rows: rows that share a scale."""

    out: int
    first: int
    depth: int
    scale_rows: int


class Launch(NamedTuple):
    """Tile sizes. width: d. rows, columns: of a program. blocks: of columns, in all. splits: parts of d."""

    width: int
    rows: int
    columns: int
    blocks: int
    splits: int
    parts: tuple[Part, ...]


def thin_matmul_triton(rows_nd: Array, matrices: Sequence[Matrix], *, interpret: bool = False) -> tuple[Array, ...]:
    """`thin_matmul` on an NVIDIA GPU; `interpret` runs the same kernel anywhere, slowly.

    Raises ValueError if there is no GPU, or for E4M3 one that cannot convert it, and `interpret` is False; and for a
    matrix that it does not take.
    """
    require_gpu(interpret=interpret, e4m3=any(matrix.scale is not None for matrix in matrices))
    for matrix in matrices:
        require_taken(matrix)
    launch = choose_launch(rows_nd, matrices)
    rows, kind = len(rows_nd), rows_nd.dtype if launch.splits == 1 else jnp.float32
    padded_d = max(pl.cdiv(launch.width, part.depth) * part.depth for part in launch.parts)
    operands, specs = [rows_nd], [pl.BlockSpec((rows, padded_d), lambda j, s, r: (0, 0))]
    outputs: dict[str, Any] = {}
    for number, (matrix, part) in enumerate(zip(matrices, launch.parts, strict=True)):
        of_columns = functools.partial(_columns, part=part, columns=launch.columns)
        operands.append(matrix.values)
        specs.append(pl.BlockSpec((padded_d, launch.columns), lambda j, s, r, of=of_columns: (0, of(j))))
        if matrix.scale is not None:
            operands.append(matrix.scale)
            shape = (matrix.scale.shape[0], launch.columns)
            specs.append(pl.BlockSpec(shape, lambda j, s, r, of=of_columns: (0, of(j))))
        out_spec = pl.BlockSpec((None, rows, launch.columns), lambda j, s, r, of=of_columns: (s, 0, of(j)))
        outputs[f"y{number}"] = ((launch.splits, rows, part.out), kind, out_spec)
    scaled = tuple(matrix.scale is not None for matrix in matrices)
    results = call(
        functools.partial(_kernel, launch=launch, rows=rows, scaled=scaled), operands, specs, outputs,
        grid=(launch.blocks, launch.splits, pl.cdiv(rows, launch.rows)), warps=WARPS, stages=STAGES,
        interpret=interpret,
    )  # fmt: skip
    # XLA fuses these sums into what reads the product; a reduction would be a kernel of its own.
    return tuple(functools.reduce(jnp.add, results[name]).astype(rows_nd.dtype) for name in outputs)


def choose_launch(rows_nd: Array, matrices: Sequence[Matrix]) -> Launch:
    """Tile sizes for these shapes."""
    rows, width = rows_nd.shape
    columns = min(max(tile(matrix.values.shape[1]) for matrix in matrices), COLUMNS)
    parts, blocks = [], 0
    for matrix in matrices:
        out, itemsize = matrix.values.shape[1], matrix.values.dtype.itemsize
        depth = min(max(SMALLEST_TILE, TILE // (columns * itemsize)), tile(width))
        if matrix.scale_rows < width:
            depth = math.gcd(matrix.scale_rows, depth)
        parts.append(Part(out, blocks, depth, matrix.scale_rows))
        blocks += pl.cdiv(out, columns)
    steps = pl.cdiv(width, max(part.depth for part in parts))
    enough = [splits for splits in SPLITS if blocks * splits >= PROGRAMS]
    splits = min(enough[0] if enough else SPLITS[-1], pl.next_power_of_2(steps))
    return Launch(width, min(tile(rows), MOST_ROWS), columns, blocks, splits, tuple(parts))


def takes(matrix: Matrix) -> bool:
    """Whether the kernel can read the matrix: tiles of d with several scales would need several products."""
    return matrix.scale is None or matrix.scale.shape[-2] == 1 or matrix.scale_rows % SMALLEST_TILE == 0


def require_taken(matrix: Matrix) -> None:
    """Raises ValueError if the kernel cannot read the matrix."""
    if matrix.scale is not None and not takes(matrix):
        raise ValueError(
            f"scales {matrix.scale.shape} of weights {matrix.values.shape}, one per {matrix.scale_rows} rows: expected "
            f"one per column, or per a multiple of {SMALLEST_TILE} rows"
        )


def _columns(block: Any, *, part: Part, columns: int) -> Any:
    """The matrix's own block of columns for a program with this number; some block where it is another matrix's."""
    last = pl.cdiv(part.out, columns) - 1
    return jnp.minimum(jnp.maximum(block - part.first, 0), last)


def _kernel(rows_ref, *refs, launch: Launch, rows: int, scaled: tuple[bool, ...]):
    number, split, first_row = pl.program_id(0), pl.program_id(1), pl.program_id(2) * launch.rows
    inputs, outputs = list(refs[: len(scaled) + sum(scaled)]), refs[len(scaled) + sum(scaled) :]
    for part, has_scale, out_ref in zip(launch.parts, scaled, outputs, strict=True):
        weights_ref, scale_ref = inputs.pop(0), inputs.pop(0) if has_scale else None
        block = number - part.first
        mine = (block >= 0) & (block < pl.cdiv(part.out, launch.columns))
        place = block * launch.columns, split, first_row

        @pl.when(mine)
        def _(part=part, of=(weights_ref, scale_ref, out_ref), place=place):
            _multiply(rows_ref, *of, part=part, launch=launch, rows=rows, place=place)


def _multiply(rows_ref, weights_ref, scale_ref, out_ref, *, part: Part, launch: Launch, rows: int, place: Any):
    """One matrix's part of a program: its columns, from place[0] on, of rows from place[2] on, over split place[1]."""
    first_column, split, first_row = place
    row_r = first_row + jnp.arange(launch.rows)
    in_r = inside(row_r, rows, launch.rows)
    in_f = inside(first_column + jnp.arange(launch.columns), part.out, launch.columns)
    here_r = pl.ds(first_row, launch.rows)

    def step(number: Array, sum_rf: Array) -> Array:
        first = number * part.depth
        in_d, here_d = inside(first + jnp.arange(part.depth), launch.width, part.depth), pl.ds(first, part.depth)
        rows_rd = load(rows_ref.at[here_r, here_d], both(in_r, in_d))
        weight_df = load(weights_ref.at[here_d, :], both(in_d, in_f))
        product_rf = dot(rows_rd, weight_df.astype(rows_rd.dtype), 1, 0)
        if scale_ref is not None:
            product_rf *= load(scale_ref.at[lax.div(first, part.scale_rows), :], in_f)[None, :]
        return sum_rf + product_rf

    every = pl.cdiv(launch.width, part.depth)
    per_split = pl.cdiv(every, launch.splits)
    start = split * per_split
    stop = start + jnp.clip(every - start, 0, per_split)
    sum_rf = lax.fori_loop(start, stop, step, jnp.zeros((launch.rows, launch.columns), jnp.float32))
    store(out_ref.at[here_r, :], sum_rf, both(in_r, in_f))
