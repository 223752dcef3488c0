"""Kernels that are traced, and lowered for a GPU, once per shape instead of once per call."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def traced_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: calls with operands of equal types, and with equal `static` arguments, share one trace.

    static: the names of the arguments that are not arrays; their values are hashable. Module constants that a test may
    change are not part of the key: what depends on them belongs into a static argument.

    JAX lowers equal operations of a program once, but a kernel equals another only if it is the same trace. A model of
    many layers then lowers a handful of kernels, each of which takes up to a second, and the copies are the same bytes,
    of which the GPU's compiler takes one. The operations are inlined into the caller, so that remat policies see them.
    """
    return functools.partial(jax.jit, static_argnames=static, inline=True)
