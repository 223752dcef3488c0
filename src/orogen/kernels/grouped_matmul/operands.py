"""What a grouped product takes beside rows and weights."""

from typing import NamedTuple

from jax import Array


class RowGroups(NamedTuple):
    """The group of each result, int32 (r,), in any order; the number of groups for a result of none, which is zero.

    r is a multiple of the number of rows: the first row is that of the first r / n results, and so on.
    """

    group_r: Array
