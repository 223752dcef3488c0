"""Rows of the vocabulary that a plan adds, so that `tensor` divides them.

A plan keeps embedding and head with `PlanConfig.vocab_rows` rows, the last ones zero. They stay zero, and no number of
the model depends on how many there are: no token reads such a row of the embedding, and the head's logits of such rows
are left out of the softmax, so that their gradients are zero; of zeros and zero gradients the optimizers, weight decay
included, make zeros. So the model itself is built, drawn, counted, converted and scored without them, and only a state
that is laid out on a plan has them: `resized` adds them where it is laid out and drops them where it is joined.
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
    """`tree`, of variables or part of an optimizer's state, whose arrays have `rows` rows of the vocabulary: zeros are
    added at the end, or rows dropped."""

    def visit(leaf: Any) -> Any:
        dim = vocab_dim(leaf) if isinstance(leaf, nnx.Variable) else None
        # optax leaves Variables around nothing for parameters it masks
        return leaf if dim is None else leaf.replace(jax.tree.map(lambda x: _resized(x, dim, rows), leaf.get_value()))

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _resized(x: jax.Array, dim: int, rows: int) -> jax.Array:
    size, dim = x.shape[dim], dim % x.ndim
    if rows <= size:
        return jax.lax.slice_in_dim(x, 0, rows, axis=dim)
    return jnp.pad(x, [(0, rows - size if i == dim else 0) for i in range(x.ndim)])
