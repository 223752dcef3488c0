"""Grouped matrix product as a loop over blocks of rows, each within one group.

A group of s rows is ceil(s / block) blocks, the last one overhanging into the next group: those rows are computed
with the wrong weight and masked. Only blocks that hold a row are visited.

Axes: n rows, d width in, f width out, e groups, r rows of a block, i blocks.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.parallel.varying import vary_like

BLOCK = 128


class Blocks(NamedTuple):
    """Group and rows of each block, int32; entries from `count` on mean nothing."""

    group_i: Array
    start_i: Array
    stop_i: Array
    count: Array


def grouped_matmul_blocks(rows_nd: Array, weights_edf: Array, group_sizes: Array, *, block: int = BLOCK) -> Array:
    """See `grouped_matmul`. `block` changes speed only."""
    return _multiply(rows_nd, weights_edf, group_sizes, min(block, len(rows_nd)))


def grouped_matmul_small_blocks(rows_nd: Array, weights_edf: Array, group_sizes: Array) -> Array:
    """The same for a few rows per group, as experts have in decoding: blocks of about twice as many, since all rows of
    a block are multiplied. On 2 CPU cores 16 rows over 8 weights of 512 x 512 take 0.69 ms by blocks of 4 and 1.0 ms by
    blocks of 16, 128 rows 1.9 ms by blocks of 8 and 2.9 ms by blocks of 128."""
    block = 1 << max(2, (2 * len(rows_nd) // len(weights_edf) - 1).bit_length())
    return grouped_matmul_blocks(rows_nd, weights_edf, group_sizes, block=min(block, BLOCK))


def split_groups(group_sizes: Array, *, rows: int, block: int) -> Blocks:
    """Splits the groups into blocks of at most `block` rows; there are at most ceil(rows / block) + e."""
    blocks_e = (group_sizes + block - 1) // block
    last_e, ends_e = jnp.cumsum(blocks_e), jnp.cumsum(group_sizes)
    index_i = jnp.arange(-(-rows // block) + len(group_sizes), dtype=jnp.int32)
    group_i = jnp.minimum(jnp.searchsorted(last_e, index_i, side="right"), len(group_sizes) - 1)
    start_i = (ends_e - group_sizes)[group_i] + (index_i - (last_e - blocks_e)[group_i]) * block
    return Blocks(group_i, start_i, jnp.minimum(start_i + block, ends_e[group_i]), last_e[-1])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply(rows_nd: Array, weights_edf: Array, group_sizes: Array, block: int) -> Array:
    """Rows (n, f), each times its group's weight."""
    blocks = split_groups(group_sizes, rows=len(rows_nd), block=block)
    return _loop_rows(rows_nd, weights_edf, blocks, block=block, contract=0)


def _forward(rows_nd, weights_edf, group_sizes, block):
    return _multiply(rows_nd, weights_edf, group_sizes, block), (rows_nd, weights_edf, group_sizes)


def _backward(block, residuals, grad_nf):
    rows_nd, weights_edf, group_sizes = residuals
    blocks = split_groups(group_sizes, rows=len(rows_nd), block=block)
    grad_rows_nd = _loop_rows(grad_nf, weights_edf, blocks, block=block, contract=1)
    return grad_rows_nd.astype(rows_nd.dtype), _loop_weights(rows_nd, grad_nf, weights_edf, blocks, block=block), None


_multiply.defvjp(_forward, _backward)


def _loop_rows(rows_nd: Array, weights_edf: Array, blocks: Blocks, *, block: int, contract: int) -> Array:
    """Each row times its group's weight, contracted over that axis of a weight: 0 forward, 1 for the gradient."""

    def step(i: Array, out_nf: Array) -> Array:
        at, valid_r1 = _place(blocks, i, rows=len(rows_nd), block=block)
        rows_rd = lax.dynamic_slice_in_dim(rows_nd, at, block)
        weight_df = weights_edf[blocks.group_i[i]]
        product_rf = lax.dot_general(
            rows_rd, weight_df, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
        )
        old_rf = lax.dynamic_slice_in_dim(out_nf, at, block)
        new_rf = jnp.where(valid_r1, product_rf.astype(out_nf.dtype), old_rf)
        return lax.dynamic_update_slice_in_dim(out_nf, new_rf, at, 0)

    out_nf = jnp.zeros((len(rows_nd), weights_edf.shape[2 - contract]), rows_nd.dtype)
    return lax.fori_loop(0, blocks.count, step, vary_like(out_nf, (rows_nd, weights_edf)))


def _loop_weights(rows_nd: Array, grad_nf: Array, weights_edf: Array, blocks: Blocks, *, block: int) -> Array:
    """The weights' gradient (e, d, f): each group's rows against the gradients of its outputs."""

    def step(i: Array, grad_edf: Array) -> Array:
        at, valid_r1 = _place(blocks, i, rows=len(rows_nd), block=block)
        # Both masked: rows of no group may hold NaN, and zero times NaN is NaN.
        rows_rd = jnp.where(valid_r1, lax.dynamic_slice_in_dim(rows_nd, at, block), 0)
        grad_rf = jnp.where(valid_r1, lax.dynamic_slice_in_dim(grad_nf, at, block), 0)
        product_df = lax.dot_general(rows_rd, grad_rf, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return grad_edf.at[blocks.group_i[i]].add(product_df)

    grad_edf = vary_like(jnp.zeros(weights_edf.shape, jnp.float32), (rows_nd, grad_nf))
    return lax.fori_loop(0, blocks.count, step, grad_edf).astype(weights_edf.dtype)


def _place(blocks: Blocks, i: Array, *, rows: int, block: int) -> tuple[Array, Array]:
    """First row of block i's window, moved up where it would pass the end, and the rows (r, 1) that are the block's."""
    at = jnp.minimum(blocks.start_i[i], rows - block)
    row_r = at + jnp.arange(block)
    return at, ((blocks.start_i[i] <= row_r) & (row_r < blocks.stop_i[i]))[:, None]
