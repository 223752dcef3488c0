"""Grouped matrix product in Mosaic GPU kernels of our own, for NVIDIA Hopper GPUs.

Axes: n rows, d width in, f width out, e groups, i blocks of rows.
"""

import functools
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.grouped_matmul.mosaic_kernels import Blocks, multiply_rows, multiply_weights
from orogen.kernels.grouped_matmul.mosaic_program import ALIGNMENT, CHUNK, ROWS, Tile
from orogen.parallel.target import HOPPER, compute_capability, platform
from orogen.parallel.varying import vary_like

MULTIPROCESSORS = 132  # of an H100
SMALLEST = ROWS  # least number of rows, and least widths: a copy of more than the array has gives nothing
DTYPES = (jnp.bfloat16, jnp.float16)


def grouped_matmul_mosaic(
    rows_nd: Array, weights_edf: Array, group_sizes: Array, *, interpret: Any = None, programs: int = MULTIPROCESSORS
) -> Array:
    """`grouped_matmul` on an NVIDIA Hopper GPU. `interpret` (see Pallas) runs the same kernels anywhere, very slowly.

    Widths that are not multiples of 64, or below 128, are padded, which copies both operands; the padded weights may
    be saved for the backward pass whatever the remat policy.
    Raises ValueError if there is no such GPU, and unless both operands are bfloat16 or both float16.
    """
    if interpret is None:
        _require_hopper()
    if rows_nd.dtype != weights_edf.dtype or rows_nd.dtype not in DTYPES:
        raise ValueError(
            f"implementation='mosaic' with rows of {rows_nd.dtype} and weights of {weights_edf.dtype}: expected both "
            "bfloat16 or both float16"
        )
    rows, out = len(rows_nd), weights_edf.shape[2]
    rows_nd = _pad(rows_nd, (SMALLEST, ALIGNMENT), (SMALLEST, CHUNK))
    weights_edf = _pad(weights_edf, (0, 1), (SMALLEST, CHUNK), (SMALLEST, CHUNK))
    settings = (interpret, programs)
    return _multiply(rows_nd, weights_edf, group_sizes.astype(jnp.int32), settings)[:rows, :out]  # pyright: ignore[reportIndexIssue]


def _require_hopper() -> None:
    if platform() != "gpu":
        raise ValueError(
            f"implementation='mosaic' needs a Hopper GPU and finds {platform()!r}: expected 'blocks' there"
        )
    capability = compute_capability()
    if capability != HOPPER:
        raise ValueError(
            f"implementation='mosaic' needs a GPU of compute capability {HOPPER} (Hopper), and this one has "
            f"{capability}: expected 'blocks'"
        )


def _pad(array: Array, *sizes: tuple[int, int]) -> Array:
    """Pads each axis to a least size and to a multiple: (size, multiple) per axis."""
    pairs = zip(array.shape, sizes, strict=True)
    widths = [(0, max(size, least) + -max(size, least) % multiple - size) for size, (least, multiple) in pairs]
    return jnp.pad(array, widths) if any(after for _, after in widths) else array


def split_groups(group_sizes: Array, *, rows: int, block: int) -> Blocks:
    """Splits the groups, and the leftover rows as one more group, into blocks that begin at aligned rows.

    If a group begins between two aligned rows, its first block begins at the one before; only its own rows count there.
    """
    sizes_e = jnp.concatenate([group_sizes, rows - jnp.sum(group_sizes, keepdims=True)])
    groups = len(sizes_e)
    # Sums and searches compare all pairs: one fused kernel each, where scans and sorts would take several.
    earlier_ee = jnp.arange(groups)[:, None] >= jnp.arange(groups)
    ends_e = jnp.sum(jnp.where(earlier_ee, sizes_e, 0), axis=1, dtype=jnp.int32)
    starts_e = ends_e - sizes_e
    aligned_e = starts_e // ALIGNMENT * ALIGNMENT
    blocks_e = jnp.where(sizes_e > 0, (ends_e - aligned_e + block - 1) // block, 0)
    last_e = jnp.sum(jnp.where(earlier_ee, blocks_e, 0), axis=1, dtype=jnp.int32)
    index_i = jnp.arange(pl.cdiv(rows + groups * (block + ALIGNMENT), block), dtype=jnp.int32)
    group_i = jnp.sum(index_i[:, None] >= last_e, axis=1, dtype=jnp.int32)
    group_i = jnp.minimum(group_i, groups - 1)
    first_i = aligned_e[group_i] + (index_i - (last_e - blocks_e)[group_i]) * block
    start_i, stop_i = jnp.maximum(starts_e[group_i], first_i), jnp.minimum(ends_e[group_i], first_i + block)
    return Blocks(group_i, first_i, start_i, stop_i, last_e[-1:])


def choose_tile(out: int) -> Tile:
    """The faster of two tiles for results of `out` columns, a multiple of CHUNK and not below SMALLEST.

    Columns past the end cost work too. Tiles in turns do 1.08 times as much work in the same time: the mean over
    outputs and both gradients, which range from 1.02 to 1.11, on an H100 (98,304 rows; 128 groups, 2688 -> 1856, and
    64 groups, 2048 -> 1024 and back).
    """
    turns = Tile(columns=min(192, out), turns=True, stages=5, slots=1, programs=MULTIPROCESSORS)
    halves = Tile(columns=256, turns=False, stages=4, slots=2, programs=MULTIPROCESSORS)
    padded_turns, padded_halves = (pl.cdiv(out, tile.columns) * tile.columns for tile in (turns, halves))
    return turns if padded_turns <= 1.08 * padded_halves else halves


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(rows_nd: Array, weights_edf: Array, group_sizes: Array, settings: tuple[Any, int]) -> Array:
    """(n, f): each row times its group's weight."""
    return _rows(rows_nd, weights_edf, group_sizes, settings, transpose=False)


def _rows(rows_nd, weights_edf, group_sizes, settings, *, transpose) -> Array:
    blocks = split_groups(group_sizes, rows=len(rows_nd), block=ROWS)
    tile = choose_tile(weights_edf.shape[1 if transpose else 2]).under(*settings)
    return vary_like(multiply_rows(rows_nd, weights_edf, blocks, transpose=transpose, tile=tile), rows_nd)


def _forward(rows_nd, weights_edf, group_sizes, settings):
    # Not through the differentiable function: a remat policy cannot see into it, and would run it twice.
    out_nf = _rows(rows_nd, weights_edf, group_sizes, settings, transpose=False)
    return out_nf, (rows_nd, weights_edf, group_sizes)


def _backward(settings, residuals, grad_nf):
    rows_nd, weights_edf, group_sizes = residuals
    grad_rows_nd = _rows(grad_nf, weights_edf, group_sizes, settings, transpose=True)
    stop_e = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tile = choose_tile(grad_nf.shape[1]).under(*settings)
    grad_edf = multiply_weights(rows_nd, grad_nf, stop_e - group_sizes, stop_e, tile=tile)
    return grad_rows_nd, vary_like(grad_edf, rows_nd), None


_multiply.defvjp(_forward, _backward)
