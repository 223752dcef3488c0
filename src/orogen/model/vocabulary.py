"""Padding of the vocabulary: rows that a plan adds, so that `tensor` divides the number of rows.

Under a plan, embedding and head have `PlanConfig.vocab_rows` rows; the last ones are padding. Padding rows stay zero,
and no result of the model depends on how many there are: no token reads one in the embedding, and the softmax leaves
out their logits, so their gradients are zero, and the optimizers keep zero parameters with zero gradients at zero, with
weight decay too. So the model itself is built, initialised, counted, converted and
scored without padding, and only state that is laid out on a plan has it: `resized` adds it when state is laid out and
drops it when state is joined.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

AXIS = "vocab"


def vocab_dim(variable: nnx.Variable) -> int | None:
    """The dimension, as a negative index, that runs over the vocabulary; None if none does."""
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
