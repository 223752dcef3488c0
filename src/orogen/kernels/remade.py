"""Functions whose backward pass starts from their inputs."""

from collections.abc import Callable
from typing import Any

import jax


def from_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose backward pass keeps the inputs alone and recomputes the rest.

    For elementwise work, of which autodiff would keep several arrays, in float32 where that is computed in.
    """
    # Nothing keeps XLA from merging both computations where it has room: they give the same.
    return jax.checkpoint(function, prevent_cse=False)
