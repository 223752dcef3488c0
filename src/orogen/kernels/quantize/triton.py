"""Rounding to 8 bits as one Triton kernel, for NVIDIA GPUs: each element is read once and written twice.

Axes: n rows, f columns.

Tiling: the grid is (tiles of COLUMNS columns, counted through all parts; tiles of ROWS rows). A program reads one tile,
rounds it, and writes it to the matrix and, transposed in registers, to the transpose.
"""

import functools
from typing import Any

from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, require_gpu, store
from orogen.kernels.traced import traced_once

# Per program. Of the tiles tried on an H100, this one has the least total time over 2048, 4096 and 10,240 columns of
# 16,384 rows.
ROWS, COLUMNS, WARPS = 64, 128, 8


def quantize_triton(
    parts: tuple[Array, ...], scale: Array, kind: Any, *, interpret: bool = False
) -> tuple[Array, Array]:
    """See `quantize`; `interpret` runs the same kernel anywhere, slowly.

    Raises ValueError if there is no GPU and `interpret` is False.
    """
    require_gpu(interpret=interpret)
    return _quantize(parts, scale, kind=kind, interpret=interpret)


@traced_once("kind", "interpret")
def _quantize(parts: tuple[Array, ...], scale: Array, *, kind: Any, interpret: bool) -> tuple[Array, Array]:
    widths, rows = tuple(part.shape[1] for part in parts), len(parts[0])
    width = sum(widths)
    whole = lambda *shape: pl.BlockSpec(shape, lambda f, n: (0,) * len(shape))  # noqa: E731
    results = call(
        functools.partial(_kernel, widths=widths, rows=rows),
        [scale.reshape(1), *parts],
        [whole(1), *(whole(*part.shape) for part in parts)],
        {"rows": ((rows, width), kind, whole(rows, width)), "columns": ((width, rows), kind, whole(width, rows))},
        grid=(sum(pl.cdiv(w, COLUMNS) for w in widths), pl.cdiv(rows, ROWS)),
        warps=WARPS,
        interpret=interpret,
    )
    return results["rows"], results["columns"]


def _kernel(scale_ref, *refs, widths: tuple[int, ...], rows: int):
    """Rounds one tile of one part; the first grid axis counts through the parts' tiles, one part after the other."""
    *part_refs, rows_ref, columns_ref = refs
    here_n = pl.ds(pl.program_id(1) * ROWS, ROWS)
    in_n = inside(pl.program_id(1) * ROWS + jnp.arange(ROWS), rows, ROWS)
    inverse = 1.0 / scale_ref[0]  # exact, since the scale is a power of two

    def tile(part_ref, start, width: int, offset: int) -> None:
        in_f = inside(start + jnp.arange(COLUMNS), width, COLUMNS)
        x_nf = load(part_ref.at[here_n, pl.ds(start, COLUMNS)], both(in_n, in_f)).astype(jnp.float32)
        rounded_nf = (x_nf * inverse).astype(rows_ref.dtype)
        there_f = pl.ds(offset + start, COLUMNS)
        store(rows_ref.at[here_n, there_f], rounded_nf, both(in_n, in_f))
        store(columns_ref.at[there_f, here_n], rounded_nf.T, both(in_f, in_n))

    number, first, offset = pl.program_id(0), 0, 0
    for part_ref, width in zip(part_refs, widths, strict=True):
        tiles = pl.cdiv(width, COLUMNS)
        mine = (number >= first) & (number < first + tiles)
        pl.when(mine)(functools.partial(tile, part_ref, (number - first) * COLUMNS, width, offset))
        first, offset = first + tiles, offset + width
