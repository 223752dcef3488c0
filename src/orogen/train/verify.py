"""Checks a plan against one device: loss, every gradient, and the parameters after one step of each optimizer.

Letters: b batch, t time.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.checks import require
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.data.packing import Batch
from orogen.model.lm import Built, build, initial_state
from orogen.moe.layer import Choice
from orogen.parallel.plan import Plan, make_plan, single_device_plan
from orogen.train.loop import leaf_name
from orogen.train.optimizer import make_optimizer, square_sums
from orogen.train.pipelined import cut, split_replay
from orogen.train.state import TrainState
from orogen.train.step import apply_gradients, batch_to_devices, gradients, in_rank_order, load_by_layer, replay_of

# Relative tolerances in float32. A gradient leaf sums up to a few thousand products in another order.
LOSS, GRADIENT, PARAMETER = 1e-5, 1e-4, 1e-6
# A token's own top-k, and what is dropped of it, may differ from the replayed only where that hung on less than this.
MARGIN = 1e-5
# A leaf this small beside the whole gradient is zero but for rounding, and is held against the whole.
NEGLIGIBLE = 1e-7
# Both are checked, whichever the run uses: Muon multiplies whole matrices, AdamW works element by element.
OPTIMIZERS = ("adamw", "muon")


class Verdict(NamedTuple):
    """Relative errors of a plan against one device.

    load_error: the largest difference of an expert's load, of the dropped tokens and of a router bias after the update;
    these are counts and signs, so it is 0 or the plan is wrong. max_parameter_error: the larger of both optimizers'.
    flips: tokens whose own choice, of experts or of what to drop, differed from the one replayed, flip_margin the
    largest margin of such a choice. zero_leaves had no gradient to compare.
    overflow_rows found no room in a buffer: what they would have added is missing, so the plan does not pass.
    """

    loss_error: float
    max_gradient_error: float
    worst_leaf: str
    max_parameter_error: float
    load_error: float
    flips: int
    flip_margin: float
    zero_leaves: list[str]
    dropped_tokens: int
    overflow_rows: int

    @property
    def passed(self) -> bool:
        """Whether every error is inside its tolerance."""
        return (
            self.loss_error <= LOSS
            and self.max_gradient_error <= GRADIENT
            and self.max_parameter_error <= PARAMETER
            and self.load_error == 0
            and self.flip_margin <= MARGIN
            and self.overflow_rows == 0
        )


def verify(config: RunConfig) -> Verdict:
    """One step of `config.plan` and of one device from equal states and a packed batch, in float32.

    The plan replays the experts that the one-device run chose and what it dropped, since rounding flips ties; the
    single device counts capacity as if it were the plan's source ranks. Needs as many devices as the plan.
    """
    config.plan.require_half_precision("float32")
    plan = make_plan(config.plan, config.need("model").model)
    sources = (config.plan.data, config.plan.context, config.plan.tensor)
    single = single_device_plan(config.plan, config.model, sources=sources)
    train = config.train
    if train is None:  # a given one was checked when it was loaded
        train = default_train(config)
        dataclasses.replace(config, train=train).check()
    optimizer = dataclasses.replace(
        config.optimizer or OptimizerConfig(learning_rate=1e-3), schedule="constant", warmup_steps=0
    )
    batch = packed_batch(config, train)
    expected = "a longer one: no token of the rows that are checked has a target"
    require(bool(batch.weights_bt.any()), train, "sequence_length", expected)
    built = build(config.model)
    stages = cut(config.model, plan, train.sequence_length)
    laid = build(config.model, stages, plan.config.vocab_rows(config.model.vocab_size))
    start = _initial(config, built, single, train.seed)
    alone = _gradients(built, config, single, start, batch, None)
    replay = jax.tree.map(lambda a: in_rank_order(a, plan, axis=-2), replay_of(alone.sums.choices))
    folded = _gradients(laid, config, plan, start, batch, replay)
    errors, zero = _leaf_errors(alone.grads, folded.grads)
    worst = int(np.argmax(errors))
    flips, margin = _flips(folded.sums.choices)
    # From one device's gradients on both, but each with the loads that its own run counted.
    updated = [
        [
            _updated(form, train, dataclasses.replace(optimizer, name=name), where, start, alone.grads, step.sums.load)
            for name in OPTIMIZERS
        ]
        for form, where, step in ((built, single, alone), (laid, plan, folded))
    ]
    return Verdict(
        loss_error=abs(folded.loss - alone.loss) / abs(alone.loss),
        max_gradient_error=float(errors[worst]),
        worst_leaf=leaf_name(built.params, worst),
        max_parameter_error=largest(_leaf_errors(a[0], b[0])[0].max() for a, b in zip(*updated, strict=True)),
        load_error=_largest_difference(
            *(
                (step.load_le, step.sums.dropped, [biases for _, biases in after])
                for step, after in zip((alone, folded), updated, strict=True)
            )
        ),
        flips=flips,
        flip_margin=margin,
        zero_leaves=[leaf_name(built.params, i) for i in zero],
        dropped_tokens=int(folded.sums.dropped),
        overflow_rows=int(folded.sums.overflow),
    )


def packed_batch(config: RunConfig, train: TrainConfig) -> Batch:
    """Random tokens in documents of uneven lengths, several a row, with padding at the end of some rows: half a row at
    most, since of a token or two some gradients are sums that cancel, and nothing but rounding is left to compare."""
    rng = np.random.default_rng(train.seed)
    shape = (train.batch_size, train.sequence_length)
    segments_bt = np.zeros(shape, np.int32)
    positions_bt = np.zeros(shape, np.int32)
    for segments_t, positions_t in zip(segments_bt, positions_bt, strict=True):
        inside = rng.permutation(np.arange(1, shape[1]))[: rng.integers(1, min(5, shape[1]))]
        edges = [0, *np.sort(inside).tolist(), shape[1]]
        for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False), 1):
            last = number == len(edges) - 1
            padding = last and rng.random() < 0.5 and start >= shape[1] / 2
            segments_t[start:end] = 0 if padding else number
            positions_t[start:end] = np.arange(end - start)
    first_bt = np.diff(segments_bt, axis=1, prepend=-1) != 0
    weights_bt = ((segments_bt != 0) & ~first_bt).astype(np.float32)
    tokens_bt = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return Batch(tokens_bt, segments_bt, positions_bt, weights_bt)


class _Step(NamedTuple):
    """Loss, gradients and loads (l, e) of the whole model, however it is laid out; sums as the step gives them."""

    loss: float
    grads: nnx.State
    load_le: Any
    sums: Any


def _initial(config: RunConfig, built: Built, plan: Plan, seed: int) -> tuple[nnx.State, nnx.State]:
    """Initial parameters and buffers, on the host."""
    layout = (plan.shardings(built.params), plan.shardings(built.buffers))
    return jax.device_get(jax.jit(lambda seed: initial_state(config.model, seed), out_shardings=layout)(seed))


def _gradients(
    built: Built, config: RunConfig, plan: Plan, start: tuple[nnx.State, nnx.State], batch: Batch, replay: Any
) -> _Step:
    """One loss and gradient on `plan`, fetched to the host."""
    params, buffers = _placed(start, built, plan)
    function = gradients(built, config.model, plan, "float32", record=True, replaying=replay is not None)

    def step(params, buffers, batch, *replay):
        loss, grads, _, sums = function(plan.working(params), buffers, batch, *replay)
        load_le = load_by_layer(sums.load, config.model, built.stages)
        return _Step(loss, built.whole(grads), load_le, sums)

    replayed = () if replay is None else (split_replay(replay, built.stages) if built.stages else replay,)
    with jax.default_matmul_precision("highest"):
        result = jax.device_get(jax.jit(step)(params, buffers, batch_to_devices(batch, plan), *replayed))
    return result._replace(loss=float(result.loss))


def _placed(state: tuple[Any, ...], built: Built, plan: Plan) -> tuple[Any, ...]:
    """(parameters, buffers) of the whole model on the plan's devices, cut as `built` is."""
    laid = tuple(jax.jit(lambda part: built.laid(part))(part) for part in state)
    return jax.device_put(laid, (plan.shardings(built.params), plan.shardings(built.buffers)))


def _leaf_errors(reference: nnx.State, other: nnx.State) -> tuple[np.ndarray, list[int]]:
    """Relative error of each leaf, and which leaves are zero in the reference."""
    pairs = list(zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True))
    norms = np.array([np.linalg.norm(np.asarray(a, np.float64)) for a, _ in pairs])
    whole = np.linalg.norm(norms)
    zero = norms <= NEGLIGIBLE * whole
    differences = np.array([np.linalg.norm(np.asarray(a, np.float64) - b) for a, b in pairs])
    return differences / np.maximum(np.where(zero, whole, norms), np.finfo(float).tiny), np.flatnonzero(zero).tolist()


def _flips(choices: Any) -> tuple[int, float]:
    """How many tokens were replayed against their own choice, and the largest margin of one."""
    found = jax.tree.leaves(choices, is_leaf=lambda x: isinstance(x, Choice))
    count = sum(int(c.flipped.sum()) for c in found)
    return count, largest(c.margin[c.flipped].max() for c in found if c.flipped.any())


def _largest_difference(reference: Any, other: Any) -> float:
    pairs = zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True)
    return largest(np.abs(np.asarray(a) - b).max(initial=0) for a, b in pairs)


def largest(values: Iterable[Any]) -> float:
    """0 if there are none; NaN if one is, which Python's max may pass over."""
    return float(np.max([0.0, *values]))


def _updated(
    built: Built, train: TrainConfig, optimizer: OptimizerConfig, plan: Plan, start: Any, grads: nnx.State, load: Any
) -> tuple[nnx.State, nnx.State]:
    """Parameters and router biases of the whole model after one update on `plan`, on the host. grads: of the whole
    model; load: as the plan's step gives it."""
    rule = make_optimizer(optimizer, train.steps, built.params)

    def update(params, buffers, grads, load):
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, zero, zero, params, buffers, rule.init(params))
        new = apply_gradients(
            state,
            built.laid(grads),
            load,
            rule,
            plan,
            grad_norm=jnp.sqrt(square_sums(grads).sum()),
            bias_rate=train.router_bias_update_rate,
            finite=jnp.asarray(True),
        )
        return built.whole(new.params), built.whole(new.buffers)

    with jax.default_matmul_precision("highest"):
        return jax.device_get(jax.jit(update)(*_placed(start, built, plan), grads, load))


def default_train(config: RunConfig) -> TrainConfig:
    """A batch that every axis of the plan divides, with rows of an odd number of tokens for each rank."""
    plan = config.plan
    unit = plan.context * plan.sequence_pieces
    tokens = max(13 * unit, 52, 2 * plan.context * config.model.reach)
    return TrainConfig(
        steps=10, batch_size=2 * plan.data * plan.microbatches, sequence_length=-(-tokens // unit) * unit, seed=0,
        sample_tokens=1,
    )  # fmt: skip
