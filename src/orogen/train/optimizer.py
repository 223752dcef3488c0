"""The optimizer and its schedule, from optax. A parameter's own axes decide whether weight decay applies and whether
Muon updates it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from orogen.config.run import OptimizerConfig
from orogen.precision.policy import DTYPES

# The update RMS that Muon is scaled to: AdamW's typical one, so that one learning rate serves both (arXiv:2502.16982).
MUON_RMS = 0.2
MOMENTS = ("mu", "nu")  # the fields of optax's states that hold them


def learning_rate(config: OptimizerConfig, steps: int, rates: Sequence[tuple[int, float]] = ()) -> optax.Schedule:
    """The rate of update i of `steps`, from 0. Warm-up is (i + 1) / warmup_steps of the peak: no update is zero.

    wsd: peak until steps - decay_steps, then min + (peak - min)(1 - sqrt(progress)). rates: constant rates with the
    update from which each holds (`TrainConfig.rates`); the schedule ends with the first of them.
    """
    if rates:
        schedule, constants = learning_rate(config, rates[0][0]), [optax.constant_schedule(rate) for _, rate in rates]
        return optax.join_schedules([schedule, *constants], [first for first, _ in rates])
    peak, low = config.learning_rate, config.learning_rate * config.min_ratio
    body = max(steps - config.warmup_steps, 1)
    after: Any
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, body, config.min_ratio)
    elif config.schedule == "wsd":
        start = body - config.decay_steps

        def falling(count):
            progress = jnp.clip((count - start) / config.decay_steps, 0, 1)
            return low + (peak - low) * (1 - jnp.sqrt(progress))

        after = falling
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    rising = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([rising, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, steps: int, params: nnx.State, rates: Sequence[tuple[int, float]] = (),
    trained: nnx.State | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Clipping by the global norm, which `update` takes as `grad_norm`, then AdamW, or Muon for matrices and AdamW for
    the rest.

    params: abstract or real, with axis names: a norm that is stacked has two dimensions, but its axes still say that it
    is a vector. trained: whether each is updated, from `trained_mask`; those that are not have no moments and do not
    decay; None: all are.
    """
    chosen = _update_rule(config, steps, params, rates)
    if trained is None:
        return chosen
    labels = jax.tree.map(lambda kept: "trained" if kept else "frozen", trained)
    return optax.partition({"trained": chosen, "frozen": optax.set_to_zero()}, labels)


def _update_rule(
    config: OptimizerConfig, steps: int, params: nnx.State, rates: Sequence[tuple[int, float]]
) -> optax.GradientTransformationExtraArgs:
    """`make_optimizer` for parameters that are all trained."""
    rate = learning_rate(config, steps, rates)
    decayed = _by_axes(params, lambda axes: _dimensions(axes) > 1)
    adamw = lambda mask: keep_in(  # noqa: E731
        config.moment_dtype,
        optax.adamw(rate, config.beta1, config.beta2, config.epsilon, weight_decay=config.weight_decay, mask=mask),
    )
    if config.name == "adamw":
        return optax.chain(_clip(config.clip_norm), adamw(decayed))
    labels = _by_axes(params, lambda axes: "muon" if is_matrix(axes) else "adamw")
    muon = contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), tree),
    )
    keep = lambda tree: jax.tree.map(lambda label, d: d and label == "adamw", labels, decayed)  # noqa: E731
    parts: Any = {"muon": keep_in(config.moment_dtype, muon), "adamw": adamw(keep)}
    return optax.chain(_clip(config.clip_norm), optax.partition(parts, labels))


def keep_in(dtype: str, optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its moments kept in `dtype` and its arithmetic in float32.

    Moments are rounded to nearest: one that would change by less than half a unit in the last place stays as it is, so
    a bfloat16 moment with a decay above 1 - 2⁻⁸ = 0.996 hardly follows its gradients.
    """
    wide = optax.with_extra_args_support(optimizer)
    if dtype == "float32":
        return wide

    def cast(state, kind):
        moment = lambda path: any(getattr(key, "name", None) in MOMENTS for key in path)  # noqa: E731
        return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(kind) if moment(path) else x, state)

    def update(updates, state, params=None, **extra):
        updates, state = wide.update(updates, cast(state, jnp.float32), params, **extra)
        return updates, cast(state, DTYPES[dtype])

    return optax.GradientTransformationExtraArgs(lambda params: cast(wide.init(params), DTYPES[dtype]), update)


def _clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm for a known norm, which optax would recompute in a pass over every gradient."""

    def update(updates, state, params=None, **extra):
        factor = limit / jnp.maximum(extra["grad_norm"], limit)
        return jax.tree.map(lambda g: g * factor, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def is_matrix(axes: tuple[str | None, ...]) -> bool:
    """Whether the last two axes are the input and output of a matrix product inside the network."""
    return _dimensions(axes) > 1 and not {"vocab", "positions", "taps"} & set(axes)


def _dimensions(axes: tuple[str | None, ...]) -> int:
    """The number of dimensions of the mathematical object. The expert axis only stacks, as repeated layers do, so
    experts' biases are vectors; Mamba-1's A_log has one decay rate per element of the state, and is a vector like
    Mamba-2's."""
    return sum(axis not in ("expert", "state") for axis in axes)


def _by_axes(params: nnx.State, choose: Callable[[tuple[str | None, ...]], Any]) -> nnx.State:
    """`params` with `choose` of each parameter's own axes in place of its array."""
    return jax.tree.map(
        lambda v: v.replace(choose(v.get_metadata()["axes"])), params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
