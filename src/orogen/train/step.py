"""One training step: loss and gradient inside the plan's shard_map, clipping and optimizer outside, under one jit.

Letters: m microbatches, b batch, t time, l layers, e experts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from orogen.config.model import ModelConfig
from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.layers.documents import numbered
from orogen.model.lm import Built
from orogen.model.stages import MOE, Stages
from orogen.moe.layer import Choice
from orogen.parallel import placement
from orogen.parallel.context import zigzag
from orogen.parallel.plan import Plan
from orogen.precision.policy import working_copy
from orogen.precision.words import step_key
from orogen.train import carry
from orogen.train.formats import with_numbers
from orogen.train.loss import Sums, batch_counts
from orogen.train.optimizer import learning_rate
from orogen.train.pipelined import Pipeline
from orogen.train.state import TrainState, abstract_state, state_shardings
from orogen.train.submodels import chooser_after, of_step, with_chooser
from orogen.train.task import Computation, Metric, Objective, Submodels
from orogen.train.trained import kept_unless, only_trained, trained_biases, trained_mask
from orogen.train.whole import WholePass

BATCH_AXES = ("batch", "context")


class StepMetrics(NamedTuple):
    """What a step reports: scalars except `load_le`, float32 or int32, equal on all devices.

    metrics: the objective's, by name. load_le: assignments per expert, one row per MoE layer in pattern order, then
    those of the MTP block. dropped: assignments beyond an expert's capacity; overflow: those that did not fit into a
    buffer, with any of which the step is skipped. worst_leaf: index of the first gradient leaf that is not finite, or
    -1.
    """

    loss: Array
    metrics: dict[str, Metric]
    tokens: Array
    load_le: Array
    dropped: Array
    overflow: Array
    grad_norm: Array
    learning_rate: Array
    worst_leaf: Array
    skipped: Array
    skipped_in_row: Array


def gradients(
    built: Built,
    objective: Objective,
    config: ModelConfig,
    plan: Plan,
    dtype: str,
    *,
    record: bool = False,
    replaying: bool = False,
    carried: Any = None,
    frozen: Any = None,
    seed: int = 0,
) -> Callable[..., Any]:
    """A function (params, buffers, batch, replay, carried, *, step, frozen) -> loss, gradients, Counts, Sums of a
    global batch.

    The batch is split into `plan.config.microbatches` parts, whose gradients add up to those of the whole. Gradients
    are sharded as parameters are stored. They are float32 if they are sums over microbatches or devices, else in the
    dtype of the parameters, which may be masters or working copies in `dtype`.

    record: whether Sums.choices holds every token's experts and drops. replaying: whether routers take the choices that
    are passed as `replay`. carried: the states that batches carry, as `carry.abstract` gives them; frozen: the
    variables of the task's frozen model. Both may be abstract; where one is None, the function's argument of that name
    is None too. seed, step: the run's seed, and the number of steps before this one; stochastic rounding depends on
    both.
    """
    parts, sources = plan.config.microbatches, plan.sources[0]
    depths = objective.depths(config)

    def device_step(params, buffers, batch, inputs: _Inputs):
        replay, before, known, key = inputs
        # Counted for all microbatches at once. In a loop of their own, on which the model does not depend, the counting
        # collectives deadlocked with the model's first ones on XLA:CPU (observed with jax 0.10.1): devices ran the two
        # in different orders.
        counts = batch_counts(batch, objective, depths, plan)
        computation = Computation(objective.knowing(known), config, plan.in_step(key, batch.tokens_bt), dtype)
        batch = jax.tree.map(lambda x: microbatches(x, parts, sources), batch)
        settings: Any = {"replay": replay}
        if before is not None:
            settings["carried"] = carry.parts(before, parts, sources)
        passes = partial(skeleton(built), computation, batch, counts, buffers, **settings)
        assigned = passes().assigned(params) if _needs_counts_first(config, depths, parts) else None
        loss, grads, sums = passes(record=record, assigned=assigned).gradients(params)
        if before is not None:
            sums = sums._replace(carried=carry.joined(before, sums.carried, sources, plan))
        if plan.config.fsdp != "gradients":
            grads = placement.scatter_gradients(grads, plan)
        return loss, placement.sum_gradients(grads, plan), counts, sums

    settings = {"depths": depths, "record": record, "replaying": replaying, "carried": carried, "seed": seed}
    return _shard(device_step, built, config, plan, frozen=frozen, **settings)


class _Inputs(NamedTuple):
    """What a step takes on each device beside the model and the batch; see `gradients`. key: of the step's random
    words."""

    replay: Any
    carried: Any
    frozen: Any
    key: Any


def skeleton(built: Built) -> Callable[..., WholePass | Pipeline]:
    """The constructor of the class that runs a model of this layout. Both classes take the same arguments."""
    if isinstance(built.layout, Stages):
        return partial(Pipeline, built.layout)
    return partial(WholePass, built.graph)


def _needs_counts_first(config: ModelConfig, depths: int, parts: int) -> bool:
    """Whether a pass over all microbatches must count assignments before the first gradient, because each microbatch's
    balance loss is weighted by the global batch's assignments per expert."""
    balanced = config.router_balance == "global" and config.router_aux_loss_coef > 0
    return balanced and MOE in config.layers.main + config.layers.mtp * (depths > 0) and parts > 1


def _shard(
    device_step: Callable, built: Built, config: ModelConfig, plan: Plan, *, depths: int, record: bool,
    replaying: bool, carried: Any, frozen: Any, seed: int,
) -> Callable[..., Any]:  # fmt: skip
    batch_spec = plan.spec(*BATCH_AXES)
    replicated: Any = plan.spec()
    params, buffers = plan.specs(built.params), plan.specs(built.buffers)
    choices: Any = built.layout.choice_specs(plan, depths)
    carried = plan.specs(carried)
    sums = Sums(
        metrics=replicated, load=built.layout.load_specs(plan), dropped=replicated, overflow=replicated,
        choices=choices if record else (), carried=carried,
    )  # fmt: skip
    replay = replay_of(choices) if replaying else None
    outputs = (replicated, placement.stored_specs(built.params, plan), replicated, sums)
    inputs = (params, buffers, batch_spec, _Inputs(replay, carried, plan.specs(frozen), replicated))
    on_devices = plan.run(device_step, inputs=inputs, outputs=outputs)

    def run(
        params: Any, buffers: Any, batch: Batch, replay: Any = None, carried: Any = None, *, step: Any = 0,
        frozen: Any = None,
    ) -> Any:  # fmt: skip
        key = step_key(seed, step)
        return on_devices(params, buffers, with_numbers(batch, plan), _Inputs(replay, carried, frozen, key))

    return run


def replay_of(choices: Any) -> Any:
    """The Replay of each Choice in the tree."""
    return jax.tree.map(lambda c: c.replay, choices, is_leaf=lambda x: isinstance(x, Choice))


def microbatches(x_bt: Array, parts: int, sources: int) -> Array:
    """(m, b / m, t, …): each of the `sources` source ranks contributes an equal run of its rows to every microbatch."""
    rows, *others = x_bt.shape
    split = x_bt.reshape(sources, parts, rows // (sources * parts), *others)
    return split.swapaxes(0, 1).reshape(parts, rows // parts, *others)


def update_bias(bias: Array, load: Array, rate: float, present: Array | None = None) -> Array:
    """b + rate · sign(mean load - load), so that an expert below its share is chosen more often (arXiv:2408.15664).

    bias, load: (…, e) float32. present: 1 for the experts that a submodel has, over which the mean is taken, 0 for the
    others, whose biases stay; None: all are present.
    """
    if present is None:
        return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    mean = jnp.sum(load * present, -1, keepdims=True) / jnp.maximum(present.sum(-1, keepdims=True), 1)
    return bias + rate * jnp.sign(mean - load) * present


@jax.named_scope("optimizer")
def apply_gradients(
    state: TrainState,
    grads: nnx.State,
    load: list[Array],
    optimizer: optax.GradientTransformationExtraArgs,
    plan: Plan,
    *,
    grad_norm: Array,
    bias_rate: float,
    finite: Array,
    trained: nnx.State | None = None,
    moving: Sequence[bool] | None = None,
    left: Any = None,
    present: list[Array] | None = None,
) -> TrainState:
    """The state after one update or, unless `finite`, the same state with the step counted as skipped.

    load: as in `Sums`. trained: whether each parameter is updated, from `trained_mask`; moving: whether each buffer is,
    from `trained_biases`; None: all are. left: the states that the batch leaves to the next one. present: for each
    load, which experts are present (see `update_bias`); None: all are.
    """
    grads = lax.with_sharding_constraint(grads, placement.shardings(grads, plan))

    def update(params: nnx.State, buffers: nnx.State, opt_state: optax.OptState) -> tuple[Any, ...]:
        updates, opt_state = optimizer.update(grads, opt_state, params, grad_norm=grad_norm)
        leaves, structure = jax.tree.flatten(buffers)  # none if routers have no correction bias
        counted = load if leaves else []
        rates = [bias_rate if moves else 0.0 for moves in moving or [True] * len(leaves)]
        there = present if present and leaves else [None] * len(leaves)
        biases = [update_bias(*of_layer) for of_layer in zip(leaves, counted, rates, there, strict=True)]
        changed = kept_unless(trained, optax.apply_updates(params, updates), params)
        return changed, jax.tree.unflatten(structure, biases), opt_state

    if plan.config.offload_optimizer:
        # The fetched state is a copy already; a condition would make another.
        old = state.params, state.buffers, placement.fetched(state.optimizer, plan)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(*old), old)
    else:
        # A condition, because an elementwise choice between old and new values copies the old moments first.
        after = lax.cond(finite, update, lambda *old: old, state.params, state.buffers, state.optimizer)
    missed = 1 - finite.astype(jnp.int32)
    counters = state.step + 1, state.skipped + missed, (state.skipped_in_row + 1) * missed
    return TrainState(*counters, *after, carried=carry.after(left, finite))


def make_step(
    built: Built,
    objective: Objective,
    config: RunConfig,
    plan: Plan,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    replaying: bool = False,
    frozen: Any = None,
    submodels: Submodels | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The jitted training step: (state, batch[, frozen, replay]) -> state, metrics. It donates the state and returns it
    with the same shardings. replaying, frozen: see `gradients`. submodels: those that the steps train; None: the whole
    model."""
    function = step_function(
        built, objective, config, plan, optimizer, replaying=replaying, frozen=frozen, submodels=submodels
    )
    carried = carry.abstract(config.train, built)

    def step(state: TrainState, batch: Batch, frozen: Any = None, replay: Any = None) -> tuple[TrainState, StepMetrics]:
        return function(state, batch, replay, frozen=frozen)[:2]

    target = with_chooser(abstract_state(built, optimizer, carried), submodels, plan)
    shardings = state_shardings(target, plan)
    return jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, plan.sharding()), compiler_options=plan.compiler_options
    )


def step_function(
    built: Built,
    objective: Objective,
    config: RunConfig,
    plan: Plan,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    record: bool = False,
    replaying: bool = False,
    frozen: Any = None,
    submodels: Submodels | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics, Any]]:
    """The training step before jit: (state, batch[, replay, frozen]) -> state, metrics, choices. record, replaying,
    frozen: see `gradients`; submodels: see `make_step`."""
    plan = dataclasses.replace(plan, nested=submodels is not None)
    gradient = gradients(
        built, objective, config.model, plan, config.train.compute_dtype, record=record, replaying=replaying,
        carried=carry.abstract(config.train, built), frozen=frozen, seed=config.train.seed,
    )  # fmt: skip
    bias_rate = config.train.router_bias_update_rate
    rate = learning_rate(config.optimizer, config.train.steps, config.train.rates)
    trained, moving = trained_mask(built, config.optimizer), trained_biases(built, config.optimizer)

    def step(
        state: TrainState, batch: Batch, replay: Any = None, frozen: Any = None
    ) -> tuple[TrainState, StepMetrics, Any]:
        params, settle = of_step(submodels, state)
        params = placement.working(working_copy(params, config.train.compute_dtype), plan)
        at = {"step": state.step, "frozen": frozen}
        loss, grads, counts, sums = gradient(params, state.buffers, batch, replay, state.carried, **at)
        grads, present, chooser = settle(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        grads = only_trained(grads, trained)  # XLA then omits the work for the others
        squares = placement.square_sums(grads, plan)
        finite_leaves = jnp.isfinite(squares)
        # Assignments that overflow a buffer are missing from loss and gradient: the step counts as not finite.
        finite = finite_leaves.all() & jnp.isfinite(loss) & (sums.overflow == 0)
        grad_norm = jnp.sqrt(squares.sum())
        new = apply_gradients(
            state, grads, sums.load, optimizer, plan, grad_norm=grad_norm, bias_rate=bias_rate, finite=finite,
            trained=trained, moving=moving, left=sums.carried, present=present,
        )  # fmt: skip
        new = new._replace(chooser=chooser_after(chooser, state.chooser, finite))
        metrics = StepMetrics(
            loss=loss,
            metrics={name: Metric(total, counts.metrics[name]) for name, total in sums.metrics.items()},
            tokens=counts.tokens[0],
            load_le=built.layout.loads(sums.load),
            dropped=sums.dropped,
            overflow=sums.overflow,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(rate(state.step - state.skipped), jnp.float32),
            worst_leaf=jnp.where(finite_leaves.all(), -1, jnp.argmin(finite_leaves)),
            skipped=new.skipped,
            skipped_in_row=new.skipped_in_row,
        )
        return new, metrics, sums.choices

    return step


def batch_to_devices(batch: Batch, plan: Plan) -> Batch:
    """The global batch on the plan's devices. Documents are numbered here, where sequences are still whole.

    Each process has packed the whole batch, because rows are packed in one order, and supplies what its devices hold:
    a part of every row if `context` crosses processes, the same rows as another process if `tensor` or `stage` does.
    """
    sharding = plan.sharding(*BATCH_AXES)
    batch = batch._replace(segments_bt=numbered(np.asarray(batch.segments_bt)))
    return jax.tree.map(lambda x: placement.from_host(in_rank_order(x, plan, axis=1), sharding), batch)


def in_rank_order(x: Any, plan: Plan, *, axis: int) -> np.ndarray:
    """`x` with the tokens along `axis` in the order in which the ranks of `context` hold them."""
    return np.take(x, zigzag(np.shape(x)[axis], plan.size("context")), axis)
