"""The two sides of a check: a plan, and one device that computes the same with the plainest implementations.

Letters: m microbatches, b batch, t time, k experts per token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from orogen.config.checks import require
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig, TrainConfig
from orogen.cost.assemble import assemble
from orogen.data.images import Placed, with_images
from orogen.data.packing import NEXT, NEXT_WEIGHT, NOTHING, Batch
from orogen.layers.adapter import FACTORS
from orogen.model.lm import Built, build, initial_state
from orogen.parallel.plan import Plan, single_device_plan
from orogen.train.formats import in_formats
from orogen.train.step import in_rank_order, replay_of

TANH_GATE = "tanh_gate"  # the name of parameters that start at zero
GATE = np.float32(0.5)  # what a check sets them to
FACTOR = np.float32(0.05)  # the magnitude to which a check sets adapters' factors B, which start at zero too
MAX_IMAGES = 3  # per row of a check's batch
# (config, n) -> n batches of the config's shape, for a check.
Batches = Callable[[RunConfig, int], list[Batch]]


class Side(NamedTuple):
    """A plan, the model as laid out for it, and the run's config with this side's compute dtype."""

    config: RunConfig
    plan: Plan
    built: Built


class Sides(NamedTuple):
    """One device, the plan, and the parameters and buffers of the whole model, on the host, from which both start."""

    alone: Side
    folded: Side
    start: tuple[nnx.State, nnx.State]


def sides(config: RunConfig) -> Sides:
    """Both sides of `config`, which has the plan's compute dtype; the one device computes in float32."""
    plan, built = assemble(config.model, config.plan, length=config.train.sequence_length)
    rounded = lambda plan: in_formats(plan, config.precision, config.model)  # noqa: E731
    folded = rounded(plan), built
    alone = rounded(reference_plan(config.plan, config.model)), build(config.model)
    exact = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype="float32"))
    # Not under jit: compiling the initialisation of every parameter takes longer than a small model's gradients.
    params, buffers = jax.device_get(initial_state(config.model, config.train.seed))
    start = with_open_gates(params), buffers
    return Sides(Side(exact, *alone), Side(config, *folded), start)


def with_open_gates(params: nnx.State) -> nnx.State:
    """The parameters with tanh gates set to GATE, and adapters' factors B to small numbers: zeros would let no gradient
    through."""

    def opened(path: tuple[Any, ...], x: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        if TANH_GATE in names:
            return x + GATE
        if FACTORS[1] in names:
            return x + FACTOR * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
        return x

    return jax.tree_util.tree_map_with_path(opened, params)


def reference_plan(config: PlanConfig, model: ModelConfig) -> Plan:
    """One device that takes the whole batch at once, with the plainest implementations. Capacity counts per source rank
    and microbatch, so its sources are each rank's part of each microbatch, which are neighbouring rows of the batch."""
    sources = (config.data * config.microbatches, config.context, config.tensor)
    return single_device_plan(config.plainest(), model, sources=sources)


def replayed(choices: Any, folded: Side) -> Any:
    """One device's `choices` (1, …, b, t, k) for a whole batch, laid out for replay on the plan: (m, …, b / m, t, k).
    Each data rank's run of rows is split into one run per microbatch; tokens are in the order of the context ranks."""
    ranks, parts = folded.plan.config.data, folded.plan.config.microbatches

    def lay(choice: np.ndarray) -> np.ndarray:
        _, *stack, rows, time, k = choice.shape
        apart = choice.reshape(*stack, ranks, parts, rows // (ranks * parts), time, k)
        taken = np.moveaxis(apart, len(stack) + 1, 0).reshape(parts, *stack, rows // parts, time, k)
        return in_rank_order(taken, folded.plan, axis=-2)

    return folded.built.layout.split_replay(jax.tree.map(lay, replay_of(choices)))


def packed_batch(config: RunConfig, train: TrainConfig) -> Batch:
    """Random tokens in documents of uneven lengths, several per sequence; some sequences end in padding, which is at
    most half of a sequence: with only a token or two, some gradients are sums that cancel, so that only rounding would
    be compared."""
    rng = np.random.default_rng(train.seed)
    shape = (train.batch_size, train.sequence_length)
    segments_bt = np.zeros(shape, np.int32)
    positions_bt = np.zeros(shape, np.int32)
    for segments_t, positions_t in zip(segments_bt, positions_bt, strict=True):
        inside = rng.permutation(np.arange(1, shape[1]))[: rng.integers(1, min(5, shape[1]))]
        edges = [0, *np.sort(inside).tolist(), shape[1]]
        for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False), 1):
            last = number == len(edges) - 1
            padding = last and rng.random() < 0.5 and start >= shape[1] / 2 and not train.carry_states
            segments_t[start:end] = 0 if padding else number
            positions_t[start:end] = np.arange(end - start)
    first_bt = np.diff(segments_bt, axis=1, prepend=-1) != 0
    weights_bt = ((segments_bt != 0) & ~first_bt).astype(np.float32)
    tokens_bt = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    batch = Batch(tokens_bt, segments_bt, positions_bt, weights_bt)
    if "x" in config.model.layers.main:
        batch = _with_random_images(batch, config.model, rng)
    if not train.carry_states:
        return batch
    # Each sequence continues one of the previous batch: its first document is already `sequence_length` tokens long,
    # and its last position has a target too, here an arbitrary token.
    positions_bt += np.where(segments_bt == 1, train.sequence_length, 0).astype(np.int32)
    ends_bt = np.diff(segments_bt, axis=1, append=segments_bt[:, -1:]) != 0
    next_bt = np.where(ends_bt, NOTHING, np.roll(tokens_bt, -1, axis=1)).astype(np.int32)
    extras = {NEXT: next_bt, NEXT_WEIGHT: (~ends_bt).astype(np.float32)}
    return batch._replace(positions_bt=positions_bt, extras={**batch.extras, **extras})


def _with_random_images(batch: Batch, model: ModelConfig, rng: np.random.Generator) -> Batch:
    """One to MAX_IMAGES images in each row, at random tokens: some documents have none, some several."""
    shape, tokens, rows = (model.image_features, model.image_feature_size), model.encoded_tokens, []
    for segments_t in batch.segments_bt:
        indices = np.flatnonzero(segments_t)
        count = rng.integers(1, min(MAX_IMAGES, len(indices)) + 1)
        positions = np.sort(rng.choice(indices, count, replace=False)).tolist()
        images = [Placed(p, rng.normal(size=shape).astype(np.float32)) for p in positions]
        if tokens is not None:
            captions = rng.integers(0, model.vocab_size, (count, tokens), dtype=np.int32)
            images = [one._replace(caption_kc=caption) for one, caption in zip(images, captions, strict=True)]
        rows.append(images)
    return with_images(batch, rows, room=MAX_IMAGES, shape=shape, caption_tokens=tokens)


def packed_batches(config: RunConfig, count: int) -> list[Batch]:
    """`count` different packed batches. Raises ConfigError if one has no target."""
    seeds = ((config.train.seed + i) % 2**31 for i in range(count))
    batches = [packed_batch(config, dataclasses.replace(config.train, seed=seed)) for seed in seeds]
    expected = "a longer one: no token of the batches to check has a target"
    require(all(batch.weights_bt.any() for batch in batches), config.train, "sequence_length", expected)
    return batches


def default_train(config: RunConfig) -> TrainConfig:
    """A batch that every axis of the plan divides, with at least 13 tokens per sequence and rank."""
    plan = config.plan
    unit = plan.context * plan.sequence_pieces(routed=True)
    tokens = max(13 * unit, 52, 2 * plan.context * config.model.reach)
    return TrainConfig(
        steps=10, batch_size=2 * plan.data * plan.microbatches, sequence_length=-(-tokens // unit) * unit, seed=0,
        sample_tokens=1,
    )  # fmt: skip
