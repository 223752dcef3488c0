"""Functions whose backward pass recomputes what it needs from their inputs."""

from collections.abc import Callable
from typing import Any

import jax


def from_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` that saves only its inputs for the backward pass, which recomputes the rest.

    For elementwise work: autodiff would save several intermediates, in float32 where it computes in float32.
    """
    # prevent_cse=False: if there is memory, XLA may merge the two computations, which give the same numbers.
    return jax.checkpoint(function, prevent_cse=False)
