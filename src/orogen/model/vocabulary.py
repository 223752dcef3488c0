"""Padding of the vocabulary: rows that a plan adds, so that `tensor` divides the number of rows.

A plan keeps embedding and head with `PlanConfig.vocab_rows` rows, the last ones zero. They stay zero, and no result of
the model depends on how many there are. No token reads such a row of the embedding, and the softmax leaves out the
head's logits of such rows, so their gradients are zero; from zeros with zero gradients the optimizers make zeros, also
with weight decay. So the model itself is built, initialised, counted, converted and scored without them, and only state
that is laid out on a plan has them: `resized` adds them when it is laid out and drops them when it is joined.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

AXIS = "vocab"


def vocab_dim(variable: nnx.Variable) -> int | None:
    """Which dimension, counted from the last, runs over the vocabulary; None if none does."""
    axes = variable.get_metadata()["axes"]
    return axes.index(AXIS) - len(axes) if AXIS in axes else None


def resized(tree: Any, rows: int) -> Any:
    """`tree`, of variables or part of an optimizer's state, with `rows` rows of the vocabulary in its arrays: zeros are
    added at the end, or rows dropped."""

    def visit(leaf: Any) -> Any:
        dim = vocab_dim(leaf) if isinstance(leaf, nnx.Variable) else None
        # optax leaves an empty Variable for a masked parameter
        return leaf if dim is None else leaf.replace(jax.tree.map(lambda x: _resized(x, dim, rows), leaf.get_value()))

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _resized(x: jax.Array, dim: int, rows: int) -> jax.Array:
    size, dim = x.shape[dim], dim % x.ndim
    if rows <= size:
        return jax.lax.slice_in_dim(x, 0, rows, axis=dim)
    return jnp.pad(x, [(0, rows - size if i == dim else 0) for i in range(x.ndim)])
