"""Steps that train a submodel in place of the whole model; see `task.Submodels`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.parallel.plan import Plan
from orogen.train.state import TrainState
from orogen.train.task import Submodels

# Takes gradients for a step's parameters. Returns gradients for the whole model's, which experts were there (None: all)
# and what chooses after the step.
Settle = Callable[[Any], tuple[Any, list[Array] | None, Any]]


def of_step(submodels: Submodels | None, state: TrainState) -> tuple[Any, Settle]:
    """The parameters that a step computes with, float32 and stored like the state's, and what settles their gradients.

    Masks are taken outside of the plan's `run`: they multiply arrays wherever these are, whatever the plan.
    """
    if submodels is None:
        return state.params, lambda grads: (grads, None, None)
    chosen, learned = submodels.chosen(state.chooser, state.step)
    params, back = jax.vjp(submodels.masked, state.params, chosen)

    def settle(grads: Any) -> tuple[Any, list[Array] | None, Any]:
        of_params, of_chosen = back(grads)
        return of_params, submodels.present_experts(chosen), learned(of_chosen)

    return params, settle


def with_chooser(state: TrainState, submodels: Submodels | None, plan: Plan) -> TrainState:
    """The state before the first step, with what chooses submodels. An abstract state gets abstract arrays. Raises
    ConfigError for parameters that `submodels` refuses."""
    if submodels is None:
        return state
    if isinstance(state.step, jax.ShapeDtypeStruct):
        return state._replace(chooser=jax.eval_shape(submodels.initial))
    submodels.check(state.params)
    return state._replace(chooser=jax.jit(submodels.initial, out_shardings=plan.sharding())())


def kept(new: Any, old: Any, finite: Array) -> Any:
    """What chooses after the step: as before unless the step was `finite`."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
