"""Which mesh axes an array varies over, inside a `shard_map` that checks it (`check_vma=True`)."""

from typing import Any

import jax
from jax import lax


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes that any leaf of `tree` differs over; empty outside `shard_map`."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: Any) -> Any:
    """Marks every leaf of `tree` as varying over `axes` too; the values stay as they are.

    The transpose is a sum over the axes that were added. So the gradient of a parameter that is marked before a loop is
    reduced once, after the loop, instead of once per iteration.
    """

    def mark(leaf: Any) -> Any:
        missing = tuple(sorted(frozenset(axes) - jax.typeof(leaf).mat.varying))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def vary_like(tree: Any, reference: Any) -> Any:
    """`vary` over whatever `reference` varies over: the initial carry of a scan must match its output's type."""
    return vary(tree, varying_axes(reference))


def kernel_index(axis: str) -> jax.Array:
    """This program's index along an axis of a Pallas kernel's grid or threads, which is not an axis of the mesh."""
    return lax.axis_index(axis)
