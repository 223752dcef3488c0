"""The training state, created on the plan's mesh."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from orogen.checkpoint.steps import MODEL_ITEM
from orogen.config.model import ModelConfig
from orogen.model.lm import Built, initial_state
from orogen.parallel import placement
from orogen.parallel.plan import Plan
from orogen.train.carry import emptied


class TrainState(NamedTuple):
    """Float32 master parameters, the routers' correction biases, optimizer state and counters (int32).

    step: batches taken; skipped: steps that were skipped and changed nothing; skipped_in_row: those since the last
    update. carried: the layers' states after the last batch, for `TrainConfig.carry_states`; see `train.carry`.
    chooser: what chooses the submodel of each step; see `train.submodels`.
    """

    step: Array
    skipped: Array
    skipped_in_row: Array
    params: nnx.State
    buffers: nnx.State
    optimizer: optax.OptState
    carried: Any = None
    chooser: Any = None


def items(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as a checkpoint holds it: what a reader of the model needs, and what only training needs. Files are
    keyed by these names."""
    trainer = {name: part for name, part in state._asdict().items() if name != "chooser" or part is not None}
    model = {name: trainer.pop(name) for name in ("params", "buffers")}
    return {MODEL_ITEM: model, "trainer": trainer}


def from_items(found: Mapping[str, dict[str, Any]]) -> TrainState:
    """The inverse of `items`."""
    return TrainState(**found[MODEL_ITEM], **found["trainer"])


def abstract_state(built: Built, optimizer: optax.GradientTransformation, carried: Any = None) -> TrainState:
    """Shapes and dtypes of the state; nothing is allocated. carried: as `carry.abstract` gives it."""
    counter: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, built.params)
    return TrainState(counter, counter, counter, built.params, built.buffers, opt_state, carried)


def state_shardings(state: TrainState, plan: Plan) -> TrainState:
    """Where the plan keeps the state between steps."""
    shardings = placement.shardings(state, plan)
    if not plan.config.offload_optimizer:
        return shardings
    return shardings._replace(optimizer=placement.offloaded(state.optimizer, shardings.optimizer))


def create_state(
    config: ModelConfig,
    built: Built,
    optimizer: optax.GradientTransformation,
    plan: Plan,
    seed: int,
    *,
    carried: Any = None,
) -> TrainState:
    """The initial state, each array created where it will live. carried: as `carry.abstract` gives it."""
    return state_creator(config, built, optimizer, plan, carried=carried)(seed)


def state_creator(
    config: ModelConfig, built: Built, optimizer: optax.GradientTransformation, plan: Plan, *, carried: Any = None
) -> Any:
    """The jitted function of a seed that `create_state` calls. Without shardings, jit would put the optimizer's state
    on one device."""
    shardings = state_shardings(abstract_state(built, optimizer, carried), plan)

    def create(seed: Array) -> TrainState:
        params, buffers = initial_state(config, seed)
        return fresh_state(_as_held(built.laid(params), built), built.laid(buffers), optimizer, carried)

    return jax.jit(create, out_shardings=shardings)


def start_state(
    params: nnx.State,
    buffers: nnx.State,
    built: Built,
    optimizer: optax.GradientTransformation,
    plan: Plan,
    *,
    carried: Any = None,
) -> TrainState:
    """The initial state of given parameters and buffers, which are laid out like `built`'s, sharded as the plan keeps
    them, and donated. carried: as `carry.abstract` gives it."""
    shardings = state_shardings(abstract_state(built, optimizer, carried), plan)

    def create(params: nnx.State, buffers: nnx.State) -> TrainState:
        return fresh_state(_as_held(params, built), buffers, optimizer, carried)

    return jax.jit(create, out_shardings=shardings, donate_argnums=(0, 1))(params, buffers)


def _as_held(params: nnx.State, built: Built) -> nnx.State:
    """The parameters in the dtypes that the run holds them in (`trained.narrow_frozen`)."""
    return jax.tree.map(lambda have, want: have.astype(want.dtype), params, built.params)


def fresh_state(
    params: nnx.State, buffers: nnx.State, optimizer: optax.GradientTransformation, carried: Any = None
) -> TrainState:
    """The state before the first step; optimizer state is laid out like `params`. carried: as `carry.abstract` gives
    it."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, params, buffers, optimizer.init(params), emptied(carried))
