"""Whether a task can fit into the available memory: analytic lower bounds, checked before anything is allocated.

Only arrays that are certainly live at the same time count, so nothing that fits is refused; what is accepted may still
not fit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError, field_types
from orogen.config.dtype import BYTES
from orogen.config.engine import EngineConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig, TrainConfig
from orogen.cost.assemble import assemble
from orogen.cost.weight import Weight
from orogen.cost.weights import changed, weights
from orogen.infer.generate import engine_for
from orogen.infer.prepare import buckets_of
from orogen.infer.programs import Programs
from orogen.infer.sizes import sizes_of

FLOAT32 = BYTES["float32"]
COUNTED = 5  # bytes per row and token that penalties keep: an int32 count, and whether the prompt has it
# Tokens, segments and positions are int32, weights float32.
BATCH = 4 * 4
# Scoring batches sequences up to this many tokens.
SCORED_AT_ONCE = 8192
PREFIX = "ModelConfig."
ONE_DEVICE = PlanConfig(dispatch="allgather")


class Memory(NamedTuple):
    """Bytes still available on the host and on each device; device: None where devices use the host's memory."""

    host: int
    device: int | None


class Need(NamedTuple):
    """The minimum bytes needed, what they are for, and the settings that they grow with. model: for parameters, which
    also grow with its pattern and fields."""

    what: str
    size: int
    settings: dict[str, int]
    model: ModelConfig | None = None

    @property
    def cause(self) -> tuple[str, int]:
        """The largest setting that the need grows with, and its value. Slow: it traces the model once per candidate
        field. Called only to explain a refusal."""
        model = self.model
        settings = self.settings if model is None else {**_sizes(model), **self.settings}
        largest_first = sorted(settings.items(), key=lambda item: -item[1])
        return next(s for s in largest_first if model is None or s[0] in self.settings or _dominates(s[0], model))

    def times(self, factor: int) -> "Need":
        """The same need of `factor` devices together."""
        return self._replace(size=self.size * factor)


def require_training_fits(config: RunConfig, memory: Memory) -> None:
    """Raises ConfigError if the host cannot hold the batch, or a device its part of the first step."""
    batch = _batch(config.train)
    device = _training(config)
    if memory.device is not None:  # otherwise the host's need covers it
        device.append(batch._replace(size=batch.size // (config.plan.data * config.plan.context)))
    _require("training", [batch], device, config.plan.devices, memory)
    tokens = config.train.sample_tokens
    engine = engine_for(rows=len(config.train.sample_prompts), length=tokens + 1)
    held = _serving(config.model, ONE_DEVICE, engine, {"TrainConfig.sample_tokens": tokens})
    _require("sampling", [], held, 1, memory)


def require_distillation_fits(config: RunConfig, teacher: ModelConfig, plan: PlanConfig, memory: Memory) -> None:
    """Raises ConfigError if a device cannot hold its part of the first step beside a teacher on `plan`: its parameters,
    and its hidden states of the whole batch, or of the student's rank of it."""
    train, itemsize = config.train, BYTES[config.train.compute_dtype]
    tokens = train.batch_size * train.sequence_length // (config.plan.data * config.plan.context)
    wide = {**_batch_settings(train), "the teacher's hidden_size": teacher.hidden_size}
    beside = [_parameters("the teacher's parameters", teacher, _stored(teacher, plan) * itemsize)]
    if config.distill.top_k is None:
        beside.append(Need("the teacher's hidden states", tokens * teacher.hidden_size * itemsize, wide))
    if pairs := len(config.distill.states):
        streams = {**_batch_settings(train), "DistillConfig.states": pairs}
        beside.append(Need("its streams", tokens * pairs * config.model.hidden_size * itemsize, streams))
    _require("distillation", [_batch(train)], [*_training(config), *beside], config.plan.devices, memory)


def require_verification_fits(config: RunConfig, train: TrainConfig, *, host: int) -> None:
    """Raises ConfigError if checking the plan on simulated devices takes more than `host` bytes.

    train: describes the batch of the check. The host holds the whole parameters and the single device's gradient, in
    float32, and the gradient of each of the plan's devices.
    """
    plan, batch = config.plan, _batch(train)
    axes = {f"PlanConfig.{name}": getattr(plan, name) for name in ("data", "context", "tensor", "microbatches")}
    if config.train is None:  # the plan decides its batch size
        batch = batch._replace(settings=axes)
    whole = _parameters("parameters and their gradient", config.model, 2 * FLOAT32 * count(config.model))
    copies = Need("the devices' gradients", FLOAT32 * _stored(config.model, plan), axes, config.model)
    _require("verification", [batch, whole], [copies], plan.devices, Memory(host, None))


def require_inference_fits(
    model: ModelConfig,
    plan: PlanConfig | None,
    engine: EngineConfig,
    memory: Memory,
    *,
    settings: dict[str, int],
    share: float = 1.0,
) -> None:
    """Raises ConfigError if an engine's weights, caches and logits exceed the memory of a device. plan: None for one
    device. settings: by name, the values from which unbound fields of the engine's config were derived. share: of the
    parameters' bytes in the compute dtype that they take; less than 1 if some are held in 8 bits."""
    plan = plan or ONE_DEVICE
    _require("inference", [], _serving(model, plan, engine, settings, share), plan.devices, memory)


def require_scoring_fits(model: ModelConfig, memory: Memory, *, blocked: bool, rows: int, tokens: int) -> None:
    """Raises ConfigError if a pass over one batch of sequences exceeds the memory of one device, or the logits of all
    sequences, which the host collects, exceed the host's. blocked: whether attention works in blocks and never holds
    all its scores."""
    settings = {"rows of --tokens": rows, "length of --tokens": tokens}
    logits = Need("logits", rows * tokens * model.vocab_size * FLOAT32, settings)
    together = min(rows, max(1, SCORED_AT_ONCE // tokens))
    _require("scoring", [logits], _inference(model, not blocked, together, tokens, settings), 1, memory)


def require_evaluation_fits(
    model: ModelConfig, memory: Memory, *, dtype: str, blocked: bool, batch_tokens: int, length: int,
    settings: dict[str, int], loaded: bool = False,
) -> None:  # fmt: skip
    """Raises ConfigError if a pass in `dtype` over texts of `length` tokens exceeds the memory of one device. blocked:
    see `require_scoring_fits`. settings: by name, the values that the sizes follow from. loaded: whether the parameters
    are known to fit, so that one of the settings is named even if the parameters take more."""
    together = max(1, batch_tokens // length)
    needs = _inference(model, not blocked, together, length, settings, itemsize=BYTES[dtype])
    _require("evaluation", [], needs, 1, memory, named=needs[1:] if loaded else None)


def require_carrying_fits(
    model: ModelConfig, memory: Memory, *, dtype: str, blocked: bool, longest: int, rows: int, piece: int, length: int,
    caches: int,
) -> None:  # fmt: skip
    """Raises ConfigError if reading texts exceeds a device's memory: `rows` at once, in pieces of `piece` tokens.

    caches: bytes of their caches, of `length` tokens each. longest: tokens of the longest text. blocked: see
    `require_scoring_fits`.
    """
    settings = {"the length of the longest text": longest}
    scores = None if blocked else _scores(model, rows, (piece, length), settings, FLOAT32)
    beside = [Need("keys, values and states of texts", caches, settings), *([scores] if scores else [])]
    parameters = _parameters("parameters", model, count(model) * BYTES[dtype])
    _require("evaluation", [], [parameters, *beside], 1, memory, named=beside)


def require_conversion_fits(memory: Memory, *, tensor: str, held: int) -> None:
    """Raises ConfigError if `held`, the bytes that the host needs at once for a checkpoint's largest tensor, exceeds
    the memory."""
    _require("conversion", [Need("one tensor", held, {f"the size of {tensor}": held})], [], 1, memory)


def require_export_fits(model: ModelConfig, memory: Memory) -> None:
    """Raises ConfigError if the run's model exceeds a device's memory: an export holds all of it in float32."""
    _require("conversion", [], [_parameters("parameters", model, count(model) * FLOAT32)], 1, memory)


def count(model: ModelConfig) -> int:
    """The number of parameters, from the model's config alone."""
    return sum(repeated * math.prod(weight.shape) for weight, repeated in _weights(model))


def _weights(model: ModelConfig) -> list[tuple[Weight, int]]:
    """Each parameter, and the number of layers that have it."""
    pattern, found = model.layers, weights(model)
    once = [*(weight for part in found.parts.values() for weight in part), *found.mtp]
    repeated = {letter: (pattern.main + pattern.mtp).count(letter) for letter in found.layers}
    layers = [(weight, repeated[letter]) for letter, each in found.layers.items() for weight in each]
    return [(weight, 1) for weight in once] + layers


def _parameters(what: str, model: ModelConfig, size: int) -> Need:
    return Need(what, size, {}, model)


def _sizes(model: ModelConfig) -> dict[str, int]:
    """The length of the pattern, and every integer field of the model that is not zero, by name."""
    pattern = model.layers
    fields = {name: getattr(model, name) for name, kind in field_types(ModelConfig).items() if kind is int}
    sizes = {f"{PREFIX}{name}": value for name, value in fields.items() if value}
    return {f"{PREFIX}pattern": len(pattern.main + pattern.mtp), **sizes}


def _dominates(name: str, model: ModelConfig) -> bool:
    """Whether doubling the setting gives at least 1.5 times the parameters; always true of the pattern."""
    field = name.removeprefix(PREFIX)
    return field == "pattern" or count(changed(model, **{field: 2 * getattr(model, field)})) >= 1.5 * count(model)


def _batch(train: TrainConfig) -> Need:
    return Need("the batch", BATCH * train.batch_size * train.sequence_length, _batch_settings(train))


def _batch_settings(train: TrainConfig) -> dict[str, int]:
    return {"TrainConfig.batch_size": train.batch_size, "TrainConfig.sequence_length": train.sequence_length}


def _training(config: RunConfig) -> list[Need]:
    """What one device holds: master parameters and moments, plus the larger of two: all gradients; or one microbatch's
    layer inputs, the scores of one attention layer and the logits of one chunk. Beside adapters, the parameters have
    neither masters nor moments nor gradients; adapters, and parts that are trained whole, are not counted."""
    plan, optimizer = config.plan, config.optimizer
    stored = _stored(config.model, plan)
    if config.lora is not None:
        held = _parameters("parameters", config.model, stored * BYTES[config.train.compute_dtype])
        return [held, *_activations(config)]
    # Muon keeps one moment per matrix, AdamW two of everything.
    moments = (2 if optimizer.name == "adamw" else 1) * BYTES[optimizer.moment_dtype]
    state = stored * (FLOAT32 + (0 if plan.offload_optimizer else moments))
    gradients = _parameters("gradients", config.model, stored * FLOAT32)
    activations = _activations(config)
    more = activations if sum(need.size for need in activations) > gradients.size else [gradients]
    return [_parameters("parameters and the optimizer's state", config.model, state), *more]


def _stored(model: ModelConfig, plan: PlanConfig) -> int:
    """The parameters that one device stores, if every one is sharded as far as the plan allows."""
    ranks = plan.data * plan.context
    dense = plan.tensor * (1 if plan.fsdp == "none" else plan.fsdp_size or ranks)
    experts = plan.expert * plan.expert_tensor if plan.fsdp == "none" else ranks * plan.tensor
    ways = {True: experts * plan.stage, False: dense * plan.stage}
    return sum(
        repeated * math.prod(weight.shape) // ways["expert" in weight.axes] for weight, repeated in _weights(model)
    )


def _activations(config: RunConfig) -> list[Need]:
    """What one microbatch's forward and backward pass hold on one device, beside the state."""
    plan, model, train = config.plan, config.model, config.train
    itemsize = BYTES[train.compute_dtype]
    sequences = max(1, train.batch_size // (plan.data * plan.microbatches))
    tokens = train.sequence_length // plan.context
    layers = 0 if "input" in plan.offload else len(model.layers.main)
    shares = 1 if plan.stream == "whole" else plan.tensor
    inputs = sequences * tokens * model.hidden_size * itemsize * layers // (shares * plan.stage)
    chunk = sequences * tokens if plan.cross_entropy == "full" else min(plan.logit_rows, sequences * tokens)
    logits = chunk * model.vocab_size // plan.tensor * itemsize
    settings = _batch_settings(train)
    wide = {"ModelConfig.vocab_size": model.vocab_size}
    wide |= settings if plan.cross_entropy == "full" else {"PlanConfig.logit_rows": chunk}
    scores = _scores(model, sequences, (tokens, tokens), settings, itemsize) if plan.attention == "full" else None
    # A ring multiplies half of one rank's queries with half of another's keys.
    shared = 4 * plan.tensor if plan.context > 1 else plan.tensor
    found = [
        Need("the layers' inputs", inputs, {**settings, "ModelConfig.hidden_size": model.hidden_size}),
        Need("logits", logits, wide),
    ]
    return found if scores is None else [*found, scores._replace(size=scores.size // shared)]


def _scores(
    model: ModelConfig, rows: int, pairs: tuple[int, int], settings: dict[str, int], itemsize: int
) -> Need | None:
    """The scores of one attention layer that materialises all of them. pairs: numbers of queries and keys."""
    if not set("*w+") & set(model.layers.main):
        return None
    return Need("scores of attention", rows * model.num_attention_heads * math.prod(pairs) * itemsize, settings)


def _serving(
    model: ModelConfig, plan: PlanConfig, engine: EngineConfig, settings: dict[str, int], share: float = 1.0
) -> list[Need]:
    """What an engine holds on one device: weights, the caches of its slots, snapshots of those, and a step's logits."""
    sizes = sizes_of(model, plan, engine)
    laid, built = assemble(model, plan, abstract=True)
    opened = Opened(model, laid, built, built.params, built.buffers, None)
    programs = Programs(opened, engine, sizes.drafts, sizes.length, None)
    slots = {"EngineConfig.slots": engine.slots}
    pages = {"EngineConfig.pages": engine.pages} if engine.pages else {"EngineConfig.max_length": engine.max_length}
    caches = programs.bytes_per_device(sizes.slots, sizes.pages)
    snapshots = programs.bytes_per_device(max(sizes.snapshots, 1), min(sizes.pages, 1))
    logits = sizes.slots * (sizes.drafts + 1) * model.vocab_size * FLOAT32 // plan.tensor
    buckets = buckets_of(opened, engine, sizes)  # each number of rows that a call reads has its own
    counting = sizes.slots + sum({rows for length in buckets.lengths for rows in buckets.rows(length)})
    wide = slots | {"ModelConfig.vocab_size": model.vocab_size}
    return [
        _parameters("parameters", model, int(_stored(model, plan) * BYTES[engine.compute_dtype] * share)),
        Need("caches of slots", caches, slots | (settings or pages)),
        Need("snapshots of the prefix cache", snapshots, {"EngineConfig.snapshots": engine.snapshots}),
        Need("logits", logits, wide),
        Need("counts of tokens for penalties", counting * model.vocab_size * COUNTED, wide),
    ]


def _inference(
    model: ModelConfig, whole: bool, rows: int, tokens: int, settings: dict[str, int], *, itemsize: int = FLOAT32
) -> list[Need]:
    """What a forward pass holds on one device, scores in float32. whole: whether attention materialises all of them.
    itemsize: bytes of a parameter and of a hidden number."""
    hidden = Need("hidden states", rows * tokens * model.hidden_size * itemsize, settings)
    scores = _scores(model, rows, (tokens, tokens), settings, FLOAT32) if whole else None
    needs = [_parameters("parameters", model, count(model) * itemsize), hidden]
    return needs if scores is None else [*needs, scores]


def _require(
    task: str, host: Sequence[Need], device: Sequence[Need], devices: int, memory: Memory,
    *, named: Sequence[Need] | None = None,
) -> None:  # fmt: skip
    """Raises ConfigError for needs that exceed the memory, with the cause of the largest, or the largest of `named`."""
    if memory.device is None:
        host = [*host, *(need.times(devices) for need in device)]
    for needs, available, where in ((host, memory.host, "this host"), (device, memory.device, "each device")):
        total = sum(need.size for need in needs)
        if available is None or total <= available:
            continue
        largest = max(named or needs, key=lambda need: need.size)
        name, value = largest.cause
        raise ConfigError(
            f"{name} is {value}{' layers' * (name == 'ModelConfig.pattern')}; expected less: {task} needs at least "
            f"{total:,} bytes of memory, {largest.size:,} of them for {largest.what}, and {where} has {available:,}"
        )
