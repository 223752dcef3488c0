"""What every implementation of the cross-entropy and of log-likelihoods takes.

Axes: n tokens, d model, v vocabulary of this rank.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array


class Operands(NamedTuple):
    """See `cross_entropy`.

    columns_n: the target's column of this rank's head, out of range where another rank has it.
    present_v: which columns take part (None: all).
    """

    x_nd: Array
    head_dv: Array
    columns_n: Array
    present_v: Array | None


class Reduce(NamedTuple):
    """How float32 (n,) are combined over the ranks that share the vocabulary."""

    max: Callable[[Array], Array]
    sum: Callable[[Array], Array]
