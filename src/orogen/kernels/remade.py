"""Functions whose backward pass starts from their inputs."""

from collections.abc import Callable
from typing import Any

import jax


def from_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which the backward pass finds the inputs alone and makes the rest again.

    For elementwise work, of which autodiff keeps several arrays, in float32 where it computes in it.
    """
    # Nothing keeps XLA from taking both makings as one where it has room: they give the same.
    return jax.checkpoint(function, prevent_cse=False)
