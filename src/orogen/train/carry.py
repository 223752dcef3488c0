"""States that layers carry from one batch to the next: each row of a batch continues the same row of the last batch.

The gradient stops at a row's first token (truncated backpropagation through time, doi:10.1162/neco.1990.2.4.490), so
the carried states are input data of a step: a tree of variables with logical axes, kept with the training state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.run import TrainConfig
from orogen.model.cache import Recurrent, Rows, map_layers
from orogen.model.lm import Built
from orogen.parallel.plan import Plan


def abstract(train: TrainConfig, built: Built) -> Any:
    """The states that a run of `built` carries for the global batch: a tree like the backbone's layers, of abstract
    variables with logical axes; None if it carries none."""
    if not train.carry_states:
        return None

    def start(params: nnx.State, buffers: nnx.State) -> Any:
        stack = nnx.merge(built.graph, params, buffers).backbone
        return stack.start(_room(train), jnp.dtype(train.compute_dtype))

    made = jax.eval_shape(start, built.params, built.buffers)
    named = nnx.merge(built.graph, built.params, built.buffers).backbone.cache_axes(_room(train))
    recurrent = lambda one: one if isinstance(one, Recurrent) else None  # noqa: E731
    arrays, axes = (map_layers(recurrent, tree) for tree in (made, named))
    return jax.tree.map(lambda array, names: nnx.Variable(array, axes=names), arrays, axes)


def parts(carried: Any, count: int, sources: int) -> Any:
    """Arrays (m, …): the states that each of `count` microbatches continues, for the rows that `step.microbatches`
    gives it."""

    def split(variable: nnx.Variable) -> Array:
        array, dim = variable[...], _batch_dim(variable)
        before, (rows, *after) = array.shape[:dim], array.shape[dim:]
        array = array.reshape(*before, sources, count, rows // (sources * count), *after)
        return jnp.moveaxis(array, dim + 1, 0).reshape(count, *before, rows // count, *after)

    return jax.tree.map(split, carried, is_leaf=_is_variable)


def joined(carried: Any, left: Any, sources: int, plan: Plan) -> Any:
    """The inverse of `parts`: the states `left` by the microbatches, as variables like those of `carried`."""

    def join(variable: nnx.Variable, array: Array) -> nnx.Variable:
        dim = _batch_dim(variable)
        count, *before = array.shape[: dim + 1]
        rows, *after = array.shape[dim + 1 :]
        array = array.reshape(count, *before, sources, rows // sources, *after)
        array = jnp.moveaxis(array, 0, dim + 1).reshape(*before, count * rows, *after)
        return variable.replace(plan.agreed(array, *variable.get_metadata()["axes"]))

    return jax.tree.map(join, carried, left, is_leaf=_is_variable)


def after(left: Any, finite: Array) -> Any:
    """The states for the next batch: those that this batch `left`, or empty ones after a skipped step, whose states may
    not be finite. The states from before a skipped step would not do: the next batch does not continue their text."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), left, emptied(left))


def emptied(carried: Any) -> Any:
    """The states before any text, with the shapes of `carried`, which may be abstract."""
    return map_layers(lambda one: one and one.emptied(), carried)


def _room(train: TrainConfig) -> Rows:
    return Rows(train.batch_size, 1)  # states do not grow with the sequence


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _batch_dim(variable: nnx.Variable) -> int:
    """The batch dimension: the first named one, after those of repeated layers."""
    return variable.get_value().ndim - len(variable.get_metadata()["axes"])
