"""The arguments of every implementation of the cross-entropy and of the log-likelihoods.

Axes: n tokens, d model, v vocabulary of this rank.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `cross_entropy`.

    columns_n: the target's column in this rank's head, out of range if another rank holds it.
    present_v: mask of the columns that belong to the vocabulary (None: all).
    """

    x_nd: Array
    head_dv: Array
    columns_n: Array
    present_v: Array | None


class Reduce(NamedTuple):
    """Reductions of float32 (n,) over the ranks that share the vocabulary."""

    max: Callable[[Array], Array]
    sum: Callable[[Array], Array]
