"""Products of few rows for which decoding has kernels that read 8-bit weights without decoding them in memory first.

A weight in 8 bits is decoded in memory instead if the plan has no such kernel, if its scales are finer than the kernels
support, if a dense product has more than ROWS_IN_8_BITS rows, or on a GPU of compute capability below 8.9, where Triton
cannot convert E4M3. With R1 on one H200, a step with these kernels takes 1.1 to 1.2 times as long as one with bfloat16
weights of twice the bytes (`experiments/decode_throughput`).

Letters: b batch, t time, n tokens (b · t), d width in, f width out, e experts, r rows sorted by expert.
"""

import math
from collections.abc import Sequence
from typing import Any

from jax import Array

from orogen.kernels.grouped_matmul import SCALED, grouped_matmul_scaled
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.kernels.pallas_triton import converts_e4m3
from orogen.kernels.thin_matmul import Matrix, takes, thin_matmul
from orogen.parallel.plan import Plan
from orogen.precision.scaled import Scaled

# The implementation of dense products with few rows, by that of the plan's grouped product, which decoding chooses.
THIN = {"triton_small": "triton"}
# The most rows for which the kernel is used: with 8-bit weights, and with others. 0 for others, since that has not been
# timed on a GPU yet; the option --together of experiments/decode_throughput sets it.
ROWS_IN_8_BITS, ROWS = 256, 0


def thin_products(x_btd: Array, weights: Sequence[Any], plan: Plan) -> tuple[Array, ...] | None:
    """x w (b, t, f) for each weight, by one kernel; None if the plan has no kernel for them."""
    rows, in_8_bits = math.prod(x_btd.shape[:-1]), any(isinstance(w, Scaled) for w in weights)
    most = ROWS_IN_8_BITS if in_8_bits else ROWS
    if rows > most or (name := THIN.get(plan.config.grouped_matmul)) is None or (in_8_bits and not converts_e4m3()):
        return None
    matrices = [Matrix(w.values, w.scale) if isinstance(w, Scaled) else Matrix(w) for w in weights]
    if not all(map(takes, matrices)):
        return None
    found = thin_matmul(x_btd.reshape(rows, -1), matrices, implementation=name)
    return tuple(y_nf.reshape(*x_btd.shape[:-1], -1) for y_nf in found)


def thin_grouped(x_rd: Array, weight: Any, group_sizes: Array | RowGroups | int, plan: Plan) -> Array | None:
    """x w_e (r, f) for the rows of each expert e, by a kernel that reads 8-bit weights; None if the plan has none."""
    if not isinstance(weight, Scaled) or isinstance(group_sizes, int):
        return None
    if (name := plan.config.grouped_matmul) not in SCALED or not converts_e4m3():
        return None
    matrices = Matrix(weight.values, weight.scale)
    return grouped_matmul_scaled(x_rd, matrices, group_sizes, implementation=name) if takes(matrices) else None
