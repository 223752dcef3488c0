"""Rounding of a matrix and its transpose to 8 bits, by implementation name.

Axes: n rows, f columns.
"""

import functools
from collections.abc import Sequence
from typing import Any

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen
from orogen.kernels.quantize.reference import quantize_reference
from orogen.kernels.quantize.triton import quantize_triton

IMPLEMENTATIONS = {
    "plain": quantize_reference,
    "triton": quantize_triton,
    "triton_interpreted": functools.partial(quantize_triton, interpret=True),
}


def quantize(parts: Sequence[Array], scale: Array, kind: Any, *, implementation: str) -> tuple[Array, Array]:
    """The `parts` (n, f_i) joined along f, divided by `scale`, rounded to nearest even in `kind`; and the transpose.

    Shapes (n, f) and (f, n), both row-major: an 8-bit product reads each operand along its contracted axis, so a
    training step needs both. scale: a float32 power of two, large enough that every quotient is in the range of `kind`;
    NaN makes all results NaN. No gradient.

    Raises ValueError if the name is unknown, the parts' dtypes or lengths differ, or the implementation cannot run
    here.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if len({(len(part), part.ndim, part.dtype) for part in parts}) != 1 or parts[0].ndim != 2:
        found = ", ".join(f"{part.dtype}{part.shape}" for part in parts)
        raise ValueError(f"parts are {found}: expected matrices of one dtype with equally many rows")
    return run(tuple(parts), scale.astype(jnp.float32), kind)
