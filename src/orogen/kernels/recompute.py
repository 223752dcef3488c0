"""Functions whose backward pass recomputes what it needs from their inputs."""

from collections.abc import Callable
from typing import Any

import jax


def from_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which only the inputs are kept for the backward pass, which recomputes the rest.

    For elementwise work, of which autodiff would keep several arrays, in float32 where it computes in float32.
    """
    # prevent_cse=False: where there is room, XLA may merge both computations, which give the same numbers.
    return jax.checkpoint(function, prevent_cse=False)
