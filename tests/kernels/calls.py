"""Calls of kernels with derivative rules of their own.

Axes: b batch, t time, n tokens, k choices or taps, r rows, c channels, d width in, f width out.
"""

import functools
from collections.abc import Callable
from typing import Any

from jax import numpy as jnp

from orogen.kernels.causal_conv1d import causal_conv1d
from orogen.kernels.permutation import sum_rows, take_rows
from orogen.kernels.rms_norm import rms_norm
from orogen.kernels.ssd import ssd
from orogen.precision.fp8 import fp8_matmul

NAMES = ("causal_conv1d", "rms_norm", "take_rows", "sum_rows", "fp8_matmul", "ssd")


def calls(triton: str) -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int]]:
    """By name: the operation, the shapes of its operands, and the number of its kernels forward and backward. triton:
    the name of the implementation."""
    by = {"implementation": triton}
    ticket = {"slots_nk": jnp.zeros((4, 2), jnp.int32), "source_r": jnp.zeros(8, jnp.int32)}
    return {
        "causal_conv1d": (functools.partial(causal_conv1d, activation="silu", **by), [(1, 4, 3), (3, 2)], 2),
        "rms_norm": (functools.partial(rms_norm, group_size=4, epsilon=1e-5, **by), [(3, 8), (8,), (3, 8)], 2),
        "take_rows": (functools.partial(take_rows, **ticket, **by), [(4, 8)], 2),
        "sum_rows": (functools.partial(sum_rows, **ticket, **by), [(8, 8), (4, 2)], 2),
        # Operands are rounded once forward, x and the weight, and the gradient once backward.
        "fp8_matmul": (lambda x, w: fp8_matmul(x, (w,), quantize=triton)[0], [(4, 8), (8, 3)], 3),
        # Backward it walks once, looks at pairs once and at states once.
        "ssd": (
            lambda *operands: ssd(*operands, chunk_size=16, **by)[0],
            [(1, 4, 2, 3), (1, 4, 2), (2,), (1, 4, 1, 5), (1, 4, 1, 5)],
            4,
        ),
    }  # fmt: skip
