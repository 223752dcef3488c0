"""Steps that train a submodel in place of the whole model; see `task.Submodels`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.parallel.plan import Plan
from orogen.train.state import TrainState
from orogen.train.task import Submodels

# (gradients of a step's parameters) -> gradients of the whole model's parameters, which experts the step had (None:
# all), and the chooser after the step.
Settle = Callable[[Any], tuple[Any, list[Array] | None, Any]]


def of_step(submodels: Submodels | None, state: TrainState) -> tuple[Any, Settle]:
    """The parameters that a step computes with, float32 and stored like the state's, and the function that maps their
    gradients back.

    Masks are applied outside the plan's `run`: they multiply arrays as these are stored, whatever the plan.
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
    """The state before the first step, with the initial chooser of submodels; abstract if the state is. Raises
    ConfigError for parameters that `submodels` refuses."""
    if submodels is None:
        return state
    if isinstance(state.step, jax.ShapeDtypeStruct):
        return state._replace(chooser=jax.eval_shape(submodels.initial))
    submodels.check(state.params)
    return state._replace(chooser=jax.jit(submodels.initial, out_shardings=plan.sharding())())


def chooser_after(new: Any, old: Any, finite: Array) -> Any:
    """The chooser after the step: the old one unless the step was `finite`."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
