"""How far results may be apart by rounding."""

import math

import chex
import jax
import numpy as np
from jax import numpy as jnp


def tolerance(dtype, *, terms: int) -> float:
    """Error allowed relative to the largest element, of sums of so many rounded terms.

    Errors add up like a random walk; the bound is four deviations wide.
    """
    return 4 * float(jnp.finfo(dtype).eps) * math.sqrt(terms)


def assert_within(got, want, limit: float, *, least: float = 0.0) -> None:
    """Each leaf is finite and within `limit` of the reference's largest element, or within `least`; so a leaf of zeros
    must be zero."""
    chex.assert_trees_all_equal_shapes(got, want)
    chex.assert_tree_all_finite(got)

    def check(got, want) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        error, largest = np.abs(got - want).max(initial=0.0), np.abs(want).max(initial=0.0)
        assert error <= limit * largest + least, (error, largest)

    jax.tree.map(check, got, want)


def assert_close(got, want, *, terms: int) -> None:
    """`assert_within` the tolerance of sums of so many terms, which are rounded to the dtype of `got`."""
    assert_within(got, want, tolerance(got.dtype, terms=terms))
