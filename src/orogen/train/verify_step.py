"""Checks a plan's whole training steps, and its evaluation, against one device."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.model.layout import Whole, relaid
from orogen.model.vocabulary import resized
from orogen.parallel import placement
from orogen.parallel.plan import Plan
from orogen.train import carry
from orogen.train.formats import in_formats
from orogen.train.heldout import heldout_plan, measure
from orogen.train.optimizer import make_optimizer
from orogen.train.sides import Batches, Side, replayed, sides
from orogen.train.state import TrainState, abstract_state, fresh_state, state_shardings
from orogen.train.step import StepMetrics, batch_to_devices, step_function
from orogen.train.task import Metric, Objective
from orogen.train.terms import by_row, loss_size, mean_sizes, without_rows
from orogen.train.trained import trained_mask
from orogen.train.verdict import Verdict, conditions, flips, largest, largest_difference, leaf_errors, metric_error

# Steps of a check, and the one that is made not finite: earlier steps leave a state to lose, and one more follows.
STEPS, BROKEN = 4, 2
SCORED = 2  # held-out batches


class _Steps(NamedTuple):
    """Each step's metrics, the whole model's state after the last step, and each step's choices; on the host."""

    metrics: list[StepMetrics]
    state: TrainState
    choices: list[Any]


def verify_steps(config: RunConfig, objective: Objective, batches: Batches) -> Verdict:
    """Several of the steps that `make_step` compiles: gradients, clipping, optimizer, routers' biases and counters,
    with the plan's shardings from step to step; one batch has a NaN weight, so that its step is skipped.

    The plan replays one device's choices. AdamW's epsilon is raised to the size of a typical clipped gradient;
    otherwise an element that is zero up to rounding would move by the whole learning rate, in either direction.
    """
    taken = batches(config, STEPS)
    taken[BROKEN] = _one_not_finite(taken[BROKEN])
    one, other, start = sides(config)
    size = sum(leaf.size for leaf in jax.tree.leaves(start[0]))
    smooth = dataclasses.replace(config.optimizer, epsilon=config.optimizer.clip_norm / math.sqrt(size))
    one, other = (side._replace(config=dataclasses.replace(side.config, optimizer=smooth)) for side in (one, other))
    alone = _steps(one, by_row(objective), start, taken, None)
    folded = _steps(other, objective, start, taken, [replayed(choices, other) for choices in alone.choices])
    worst_leaf, gradient_error, zero = _moment_error(alone.state, folded.state)
    found = [flips(choices) for choices in folded.choices]
    if not alone.metrics[BROKEN].skipped_in_row:
        raise ValueError(f"step {BROKEN} was not skipped; expected its batch's NaN to reach the loss")
    pairs = [pair for step, pair in enumerate(zip(alone.metrics, folded.metrics, strict=True)) if step != BROKEN]
    measured = (metric_error(without_rows(a.metrics), b.metrics) for a, b in pairs)
    rate_error = _metric_error(alone, folded, "learning_rate")
    sizes = [loss_size(float(m.loss), m.metrics, objective, config.model) for m in alone.metrics]
    return Verdict(
        loss_error=largest([_metric_error(alone, folded, "loss", sizes), rate_error, *measured]),
        max_gradient_error=largest([gradient_error, _metric_error(alone, folded, "grad_norm")]),
        worst_leaf=worst_leaf,
        max_parameter_error=_movement_error(start[0], alone.state.params, folded.state.params),
        load_error=largest_difference(_counted(alone), _counted(folded)),
        flips=sum(count for count, _ in found),
        flip_margin=largest(margin for _, margin in found),
        zero_leaves=zero,
        dropped_tokens=int(sum(m.dropped for m in folded.metrics)),
        overflow_rows=int(sum(m.overflow for m in folded.metrics)),
        **conditions("step", other.config, one.plan.config),
    )


def verify_evaluation(config: RunConfig, objective: Objective, batches: Batches) -> Verdict:
    """Compares the program that measures the objective on held-out data, without the MTP block, under the evaluation
    plan, which drops no token."""
    objective = dataclasses.replace(objective, deeper=False)
    scored = batches(config, SCORED)
    one, other, start = sides(config)
    single = dataclasses.replace(one.plan, config=one.plan.config.dropping_none(), sources=(1, 1, 1))
    alone = _scores(one._replace(plan=single), by_row(objective), start, scored)
    plan = in_formats(heldout_plan(other.config), config.precision, config.model)
    folded = _scores(other._replace(plan=plan), objective, start, scored)
    errors, miscounted = [], []
    for a, b in zip(alone, folded, strict=True):
        sizes = mean_sizes(a)
        errors += [np.max(np.abs(b[name].mean - a[name].mean) / size) for name, size in sizes.items()]
        miscounted += [np.max(np.abs(b[name].count - a[name].count)) for name in sizes]
    return Verdict(
        loss_error=largest(errors),
        max_gradient_error=None,
        worst_leaf=None,
        max_parameter_error=None,
        load_error=largest(miscounted),
        flips=0,
        flip_margin=0.0,
        zero_leaves=[],
        dropped_tokens=0,
        overflow_rows=0,
        **conditions("evaluation", other.config, one.plan.config),
    )


def _one_not_finite(batch: Batch) -> Batch:
    """The batch with one target's weight, and one nonzero element of each floating-point extra, replaced by NaN."""

    def broken(x: np.ndarray) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating):
            return x
        x = x.copy()
        x[np.unravel_index(np.argmax(x != 0), x.shape)] = np.nan
        return x

    return batch._replace(weights_bt=broken(batch.weights_bt), extras={n: broken(x) for n, x in batch.extras.items()})


def _steps(side: Side, objective: Objective, start: Any, batches: list[Batch], replays: list[Any] | None) -> _Steps:
    """Takes one step after another from `start`, a whole model's; each side's program is compiled once."""
    built, plan, config = side.built, side.plan, side.config
    trained = trained_mask(built, config.optimizer)
    optimizer = make_optimizer(config.optimizer, config.train.steps, built.params, trained=trained)
    function = step_function(built, objective, config, plan, optimizer, record=True, replaying=replays is not None)
    carried = carry.abstract(config.train, built)
    shardings = state_shardings(abstract_state(built, optimizer, carried), plan)
    program = jax.jit(
        function, donate_argnums=0, out_shardings=(shardings, plan.sharding(), None),
        compiler_options=plan.compiler_options,
    )  # fmt: skip
    laid = lambda params, buffers: fresh_state(built.laid(params), built.laid(buffers), optimizer, carried)  # noqa: E731
    state = jax.jit(laid, out_shardings=shardings)(*start)
    metrics, chosen = [], []
    with jax.default_matmul_precision("highest"):
        for number, batch in enumerate(batches):
            replay = () if replays is None else (replays[number],)
            state, reported, choices = program(state, batch_to_devices(batch, plan), *replay)
            # Fetched at once, so that only one program over simulated devices is in flight.
            metrics.append(jax.device_get(reported))
            chosen.append(jax.device_get(choices))
    layers = config.model.layers
    whole = Whole(layers.main, layers.mtp)
    joined = lambda state: resized(relaid(state, built.layout, whole), built.vocab_size)  # noqa: E731
    return _Steps(metrics, jax.device_get(jax.jit(joined)(state)), chosen)


def _metric_error(alone: _Steps, folded: _Steps, name: str, sizes: list[float] | None = None) -> float:
    """The largest error of this metric in any step, relative to `sizes` or to itself; infinite if only one side is not
    finite."""

    def error(a: float, b: float, size: float) -> float:
        if np.isfinite(a) != np.isfinite(b):
            return math.inf
        return abs(b - a) / max(size, np.finfo(float).tiny) if np.isfinite(a) else 0.0

    found, other = ([float(getattr(m, name)) for m in side.metrics] for side in (alone, folded))
    return largest(map(error, found, other, sizes or map(abs, found)))


def _moment_error(alone: TrainState, folded: TrainState) -> tuple[str, float, list[str]]:
    """The parameter whose first moment, a mean of its clipped gradients, has the largest error, and that error; and the
    parameters whose first moment is zero up to rounding."""
    one, other = (_first_moments(state.optimizer) for state in (alone, folded))
    errors, zero = leaf_errors(list(one.values()), [other[name] for name in one])
    worst, names = int(np.argmax(errors)), list(one)
    return names[worst], float(errors[worst]), [names[i] for i in zero]


def _first_moments(optimizer: Any) -> dict[str, np.ndarray]:
    """The first moments, by the paths of their parameters."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer):
        names = [jax.tree_util.keystr((part,), simple=True) for part in path]
        if "mu" in names:
            found[".".join(names[names.index("mu") + 1 :]).removesuffix(".value")] = np.asarray(leaf)
    return found


def _movement_error(start: Any, alone: Any, folded: Any) -> float:
    """The largest difference in a parameter, less what rounding it at each step may add, relative to the change that
    the steps made to it; for one that they did not change, relative to the change in all parameters."""
    leaves = zip(*(jax.tree.leaves(tree) for tree in (start, alone, folded)), strict=True)
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))  # noqa: E731
    facts = [(norm(np.asarray(b, np.float64) - a), norm(np.asarray(a, np.float64) - s), norm(a)) for s, a, b in leaves]
    whole = math.sqrt(sum(moved**2 for _, moved, _ in facts))
    rounding = STEPS * float(np.finfo(np.float32).eps)
    return largest(
        max(off - rounding * size, 0.0 if np.isfinite(off) else off) / (moved if moved > 1e-7 * whole else whole)
        for off, moved, size in facts
    )


def _counted(steps: _Steps) -> Any:
    """What must be exactly equal: counters, counts, and biases, whose updates are signs of counts."""
    state = steps.state
    counters = (state.step, state.skipped, state.skipped_in_row)
    metrics = [(m.load_le, m.dropped, m.tokens, m.skipped, m.skipped_in_row) for m in steps.metrics]
    return counters, metrics, state.buffers


def _scores(side: Side, objective: Objective, start: Any, batches: list[Batch]) -> list[dict[str, Metric]]:
    """The metrics of each batch, on the host, in float64."""
    plan: Plan = side.plan
    laid = tuple(side.built.laid(part) for part in start)
    params, buffers = jax.device_put(laid, placement.shardings((side.built.params, side.built.buffers), plan))
    score = measure(side.built, objective, side.config.model, plan, side.config.train.compute_dtype)
    with jax.default_matmul_precision("highest"):
        params = jax.jit(placement.working, static_argnums=1)(params, plan)
        found = [jax.device_get(score(params, buffers, batch_to_devices(batch, plan))) for batch in batches]
    return jax.tree.map(lambda x: np.asarray(x, np.float64), found)
