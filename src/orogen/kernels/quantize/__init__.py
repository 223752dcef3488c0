"""Rounding of a matrix to 8 bits, as it is and transposed, by implementation name.

Axes: n rows, f columns.
"""

import functools
from collections.abc import Sequence
from typing import Any

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen
from orogen.kernels.quantize.reference import quantize_plain
from orogen.kernels.quantize.triton import quantize_triton

IMPLEMENTATIONS = {
    "plain": quantize_plain,
    "triton": quantize_triton,
    "triton_interpreted": functools.partial(quantize_triton, interpret=True),
}


def quantize(parts: Sequence[Array], scale: Array, kind: Any, *, implementation: str) -> tuple[Array, Array]:
    """The matrix of `parts` (n, f_i) side by side, over `scale`, rounded to nearest even in `kind`; and its transpose.

    (n, f) and (f, n), both row-major: a product of two operands in 8 bits reads each along the axis that it sums over,
    so a training step needs both. scale: a power of two, float32, by which no element of the parts exceeds what `kind`
    holds, or NaN, which makes all NaN. No gradient.

    Raises ValueError if the name is unknown, the parts' rows differ, or the implementation cannot run here.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if len({(len(part), part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim != 2:
        found = ", ".join(f"{part.dtype}{part.shape}" for part in parts)
        raise ValueError(f"parts are {found}: expected matrices of one type with as many rows")
    return run(tuple(parts), scale.astype(jnp.float32), kind)
