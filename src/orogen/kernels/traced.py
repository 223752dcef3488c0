"""Kernels that are traced, and lowered for a GPU, once per shape instead of once per call."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: calls with operands of equal types and equal `static` arguments share one trace.

    static: the names of the arguments that are not arrays; their values must be hashable. The trace keeps whatever else
    the function reads, such as constants of its module.

    JAX lowers equal operations of a program once, but takes two kernels for equal only if they are one trace. So a
    model of many layers lowers a handful of kernels, each of which takes up to a second, and hands the GPU's compiler
    copies of the same bytes. The operations are inlined into the caller, where remat policies see them.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)
