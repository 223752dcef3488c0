"""Copies of tokens sorted by expert, and their weighted sums per token, by implementation name.

Axes: n tokens, k choices per token, r rows of the copies, d width.

`slots_nk` holds the row of each assignment, `source_r` the flat assignment (token · k + choice) of each row. They are
inverse to each other; an index past the end means none. So forward and backward passes both gather, and no sum needs a
scatter.
"""

import functools

from jax import Array

from orogen.kernels.checks import chosen
from orogen.kernels.permutation.reference import sum_rows_reference, take_rows_reference
from orogen.kernels.permutation.triton import sum_rows_triton, take_rows_triton
from orogen.parallel.varying import vary_like

TAKE = {
    "gather": take_rows_reference,
    "triton": take_rows_triton,
    "triton_interpreted": functools.partial(take_rows_triton, interpret=True),
}
SUM = {
    "gather": sum_rows_reference,
    "triton": sum_rows_triton,
    "triton_interpreted": functools.partial(sum_rows_triton, interpret=True),
}


def take_rows(x_nd: Array, slots_nk: Array, source_r: Array, *, implementation: str) -> Array:
    """Rows (r, d): row r is a copy of the token of assignment source_r, or zero if it has none. Differentiable in x.

    Raises ValueError if the name is unknown or the implementation cannot run here.
    """
    run = chosen(TAKE, implementation)
    operands = (x_nd, slots_nk, source_r)
    return run(*vary_like(operands, operands))


def sum_rows(rows_rd: Array, w_nk: Array, slots_nk: Array, source_r: Array, *, implementation: str) -> Array:
    """y_n = Σ_k w_nk · rows[slots_nk], in float32, (n, d) in the rows' dtype. Differentiable in rows and weights.

    Raises ValueError if the name is unknown or the implementation cannot run here.
    """
    run = chosen(SUM, implementation)
    operands = (rows_rd, w_nk, slots_nk, source_r)
    return run(*vary_like(operands, operands))
