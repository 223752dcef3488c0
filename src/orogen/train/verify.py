"""Checks a plan against one device: loss, every gradient, and the parameters after one step of each optimizer; whole
training steps; or held-out losses."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.config.run import OptimizerConfig, RunConfig
from orogen.data.packing import Batch
from orogen.parallel import placement
from orogen.precision.policy import working_copy
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.record import leaf_name
from orogen.train.sides import Batches, Side, default_train, packed_batch, packed_batches, replayed, sides
from orogen.train.state import TrainState
from orogen.train.step import apply_gradients, batch_to_devices, gradients
from orogen.train.task import Metric, Objective
from orogen.train.terms import by_row, loss_size, without_rows
from orogen.train.trained import trained_biases, trained_mask
from orogen.train.verdict import (
    GRADIENT,
    LOSS,
    MARGIN,
    PARAMETER,
    Verdict,
    conditions,
    flips,
    largest,
    largest_difference,
    leaf_errors,
    metric_error,
)
from orogen.train.verify_step import verify_evaluation, verify_steps

__all__ = ["GRADIENT", "LOSS", "MARGIN", "PARAMETER", "Verdict", "default_train", "largest", "packed_batch", "verify"]
# Both are checked, whichever the run uses: Muon multiplies whole matrices, AdamW works element by element.
OPTIMIZERS = ("adamw", "muon")


def verify(
    config: RunConfig,
    *,
    what: str = "gradients",
    dtype: str = "float32",
    objective: Objective = NEXT_TOKENS,
    batches: Batches = packed_batches,
    optimizers: Sequence[str] = OPTIMIZERS,
) -> Verdict:
    """`config.plan`, computing in `dtype`, against one device in float32, from equal states and packed batches.

    The one device takes the whole batch at once, with the plainest implementation of each operation, and recomputes
    nothing; `Verdict.shared` names the implementations that the plan uses too. what: `gradients` compares one loss,
    every gradient, and one update by each optimizer from equal gradients; `step` several training steps, one of them
    not finite; `evaluation` held-out losses. objective, batches: those of another task, whose packed batches have
    extras or weights of their own. optimizers: those whose updates `gradients` compares. Needs as many devices as the
    plan. Raises ConfigError.
    """
    config.plan.require_half_precision(dtype)
    train = config.train
    if train is None:  # otherwise it was checked when it was loaded
        train = default_train(config)
        dataclasses.replace(config, train=train).check()
    optimizer = dataclasses.replace(
        config.optimizer or OptimizerConfig(learning_rate=1e-3), schedule="constant", warmup_steps=0
    )
    config = dataclasses.replace(config, train=dataclasses.replace(train, compute_dtype=dtype), optimizer=optimizer)
    if not optimizers:
        raise ValueError("no optimizer to compare; expected at least one")
    gradients_alone = partial(verify_gradients, optimizers=optimizers)
    checks = {"gradients": gradients_alone, "step": verify_steps, "evaluation": verify_evaluation}
    return checks[what](config, objective, batches)


def verify_gradients(
    config: RunConfig, objective: Objective, batches: Batches, *, optimizers: Sequence[str]
) -> Verdict:
    """One loss and gradient, and one update by each of `optimizers`.

    The plan replays the experts that the one-device run chose and what it dropped, since rounding flips ties.
    """
    (batch,) = batches(config, 1)
    one, other, start = sides(config)
    placed = [_placed(start, side) for side in (one, other)]
    alone = _gradients(one, by_row(objective), placed[0], batch, None)
    folded = _gradients(other, objective, placed[1], batch, replayed(alone.sums.choices, other))
    errors, zero = leaf_errors(alone.grads, folded.grads)
    worst = int(np.argmax(errors))
    flipped, margin = flips(folded.sums.choices)
    # Both sides update from the one device's gradients, but each with the loads that its own run counted.
    updated = [
        [_updated(side, name, state, alone.grads, step.sums.load) for name in optimizers]
        for side, state, step in zip((one, other), placed, (alone, folded), strict=True)
    ]
    size = loss_size(alone.loss, alone.metrics, objective, config.model)
    return Verdict(
        loss_error=largest(
            [abs(folded.loss - alone.loss) / size, metric_error(without_rows(alone.metrics), folded.metrics)]
        ),
        max_gradient_error=float(errors[worst]),
        worst_leaf=leaf_name(one.built.params, worst),
        max_parameter_error=largest(
            leaf_errors(a.params, b.params).relative.max() for a, b in zip(*updated, strict=True)
        ),
        load_error=largest_difference(
            *(
                (step.load_le, step.sums.dropped, [one.biases for one in after])
                for step, after in zip((alone, folded), updated, strict=True)
            )
        ),
        flips=flipped,
        flip_margin=margin,
        zero_leaves=[leaf_name(one.built.params, i) for i in zero],
        dropped_tokens=int(folded.sums.dropped),
        overflow_rows=int(folded.sums.overflow),
        **conditions("gradients", other.config, one.plan.config),
    )


class _Step(NamedTuple):
    """Loss, metrics, gradients and loads (l, e) of the whole model, independent of its layout; sums as the step returns
    them."""

    loss: float
    metrics: dict[str, Metric]
    grads: nnx.State
    load_le: Any
    sums: Any


def _gradients(
    side: Side, objective: Objective, placed: tuple[nnx.State, nnx.State], batch: Batch, replay: Any
) -> _Step:
    """One loss and gradient, fetched to the host. placed: as `_placed` returns it."""
    built, plan, model = side.built, side.plan, side.config.model
    dtype = side.config.train.compute_dtype
    function = gradients(built, objective, model, plan, dtype, record=True, replaying=replay is not None)

    def step(params, buffers, batch, *replay):
        copies = placement.working(working_copy(params, dtype), plan)
        loss, grads, counts, sums = function(copies, buffers, batch, *replay)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        load_le = built.layout.loads(sums.load)
        metrics = {name: Metric(total, counts.metrics[name]) for name, total in sums.metrics.items()}
        return _Step(loss, metrics, built.whole(grads), load_le, sums)

    choices = () if replay is None else (replay,)
    with jax.default_matmul_precision("highest"):
        program = jax.jit(step, compiler_options=plan.compiler_options)
        result = jax.device_get(program(*placed, batch_to_devices(batch, plan), *choices))
    return result._replace(loss=float(result.loss))


def _placed(start: tuple[nnx.State, nnx.State], side: Side) -> tuple[nnx.State, nnx.State]:
    """Parameters and buffers of a whole model, on the side's devices in its layout."""
    built, plan = side.built, side.plan
    # From the host each device gets its part; from one device, a program per shape would cut the parts out.
    laid = jax.device_get(jax.jit(lambda parts: tuple(built.laid(part) for part in parts))(start))
    return jax.device_put(laid, placement.shardings((built.params, built.buffers), plan))


def _global_norm(grads: nnx.State) -> Array:
    squares = [jnp.einsum("...i,...i->...", g, g, precision="highest").sum() for g in jax.tree.leaves(grads)]
    return jnp.sqrt(jnp.stack(squares).sum())


class _Updated(NamedTuple):
    """Parameters and router biases of the whole model after an update."""

    params: nnx.State
    biases: nnx.State


def _updated(side: Side, name: str, placed: Any, grads: nnx.State, load: Any) -> _Updated:
    """The model after one update by the optimizer `name`, on the host. placed: as `_placed` returns it; grads: of the
    whole model; load: as the side's step returns it."""
    built, train = side.built, side.config.train
    config = dataclasses.replace(side.config.optimizer, name=name)
    rule = make_optimizer(config, train.steps, built.params, trained=trained_mask(built, config))

    def update(params, buffers, grads, load):
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, zero, zero, params, buffers, rule.init(params))
        new = apply_gradients(
            state,
            built.laid(grads),
            load,
            rule,
            side.plan,
            grad_norm=_global_norm(grads),
            bias_rate=train.router_bias_update_rate,
            finite=jnp.asarray(True),
            moving=trained_biases(built, config),
        )
        return _Updated(built.whole(new.params), built.whole(new.buffers))

    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(update)(*placed, grads, load))
