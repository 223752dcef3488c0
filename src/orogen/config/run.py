"""How a run trains: length, batch, optimizer, schedule and bookkeeping; and `RunConfig`, which holds all parts."""

import dataclasses
from typing import Annotated, Any

from orogen.config.chat import ChatConfig
from orogen.config.checks import (
    ABSENT,
    ConfigError,
    check_types,
    is_unicode,
    require,
    require_choice,
    require_not_negative,
    require_positive,
)
from orogen.config.data import DataConfig
from orogen.config.distill import DistillConfig
from orogen.config.dtype import COMPUTE
from orogen.config.elastic import ElasticConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.kinds import LAYERS
from orogen.config.lora import AdaptedModel, LoraConfig, adapted
from orogen.config.model import ModelConfig
from orogen.config.pattern import MODEL_PARTS
from orogen.config.phases import PhaseConfig, Stretch, stretches
from orogen.config.plan import PlanConfig
from orogen.config.precision import PrecisionConfig
from orogen.config.preference import PreferenceConfig
from orogen.config.remat import check_layers
from orogen.config.rl import RLConfig
from orogen.config.rounded import check_precision
from orogen.config.vision import VisionConfig

# The most tokens of a prompt with its continuation: each costs a pass over the whole sequence; more would take weeks.
MAX_LENGTH = 2**20
LOGGERS = ("tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and bookkeeping of a training run.

    compute_dtype: master weights and accumulated gradients are always float32.
    carry_states: Mamba's states and convolutions continue from each sequence to the one in the same row of the next
    batch, without a gradient between them; attention, the multi-token-prediction block and the held-out loss see each
    sequence alone.
    keep_best: every evaluation with the lowest loss so far writes a checkpoint, which replaces the last best one.
    spike_deviations: see `train.health`. roll_back_after: bad steps are those that were skipped or whose loss is a
    spike; see `train.back`. hang_minutes: or ten times the usual step, if that is longer; see `train.watch`.
    batch_ramp: such as (32, 32, 6_000_000): the batch begins with 32 sequences and grows by 32 at a time to batch_size
    within 6 million sequences, as with Megatron-LM's --rampup-batch-size.
    ngram_order: the Witten-Bell byte model is fitted on the text that the run trained on.
    loggers: beside metrics.jsonl, which is always written. wandb (Weights & Biases) and trackio are extras of their
    names; they work offline as their own environment variables say, such as WANDB_MODE=offline (report/loggers.py).
    """

    steps: Annotated[int, "optimizer steps in all"]
    batch_size: Annotated[int, "sequences of the global batch"]
    sequence_length: Annotated[int, "tokens per sequence"]
    batch_ramp: Annotated[
        tuple[int, int, int] | None, "first batch size, increment, and sequences until it is batch_size; None: constant"
    ] = None
    phases: Annotated[tuple[PhaseConfig, ...], "changes on the way, in order"] = ()
    seed: Annotated[int, "seeds the parameters and the order of the data"]
    compute_dtype: Annotated[str, "dtype of activations and the weights' working copies: float32 or bfloat16"] = (
        "float32"
    )
    carry_states: Annotated[
        bool, "whether each sequence continues the one in its row of the previous batch, with Mamba's states"
    ] = False
    router_bias_update_rate: Annotated[float, "how far one step moves the router's correction bias"] = 1e-3
    evaluate_every: Annotated[int, "steps between evaluations"] = 200
    evaluate_rows: Annotated[int, "held-out sequences per evaluation; the last evaluation reads the whole split"] = 64
    checkpoint_every: Annotated[int, "steps between checkpoints"] = 500
    checkpoint_minutes: Annotated[float, "minutes after which a checkpoint is written besides; 0: none"] = 0.0
    keep_checkpoints: Annotated[int, "how many checkpoints stay on disk"] = 2
    keep_best: Annotated[bool, "whether the checkpoint with the lowest held-out loss is written and stays too"] = False
    max_skipped_steps: Annotated[int, "consecutive non-finite steps after which the run stops"] = 10
    spike_deviations: Annotated[float, "robust standard deviations above which a loss is a spike; 0: none is"] = 0.0
    spike_window: Annotated[int, "last good steps whose losses bound the next one"] = 64
    roll_back_after: Annotated[int, "consecutive bad steps after which the run goes back and past them; 0: never"] = 0
    repeat_bad_steps: Annotated[bool, "whether bad steps are first computed again: other bits mean bad hardware"] = (
        False
    )
    max_roll_backs: Annotated[int, "roll-backs to one checkpoint after which the run stops"] = 3
    hang_minutes: Annotated[float, "minutes without a step after which the process ends as hung; 0: never"] = 10.0
    keep_program: Annotated[
        bool, "whether the traced step is kept in a file, by which an equal run on one process starts sooner"
    ] = False
    sample_prompts: Annotated[tuple[str, ...], "texts that the final samples continue"] = ("",)
    sample_tokens: Annotated[int, "tokens per sample"] = 128
    loggers: Annotated[tuple[str, ...], "where people look at metrics: some of tensorboard, wandb and trackio"] = (
        "tensorboard",
    )
    ngram_order: Annotated[int, "order of the byte n-gram model fitted for comparison; 0 fits none"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(
            self,
            "steps",
            "batch_size",
            "sequence_length",
            "evaluate_every",
            "evaluate_rows",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped_steps",
            "max_roll_backs",
            "sample_tokens",
        )
        require(self.sequence_length > 1, self, "sequence_length", "at least 2: a token and its target")
        require(self.sample_tokens < MAX_LENGTH, self, "sample_tokens", f"at most {MAX_LENGTH - 1}")
        require(0 <= self.seed < 2**31, self, "seed", "an integer from 0 to 2**31 - 1")
        require(0 <= self.ngram_order <= 7, self, "ngram_order", "a number from 0 to 7")
        require_not_negative(self, "router_bias_update_rate", "checkpoint_minutes", "hang_minutes")
        require_not_negative(self, "spike_deviations", "roll_back_after")
        require(self.spike_window > 1, self, "spike_window", "at least 2: one loss has no deviation")
        expected = f"at most TrainConfig.max_skipped_steps = {self.max_skipped_steps}, after which the run stops"
        require(self.roll_back_after <= self.max_skipped_steps, self, "roll_back_after", expected)
        require(len(self.sample_prompts) > 0, self, "sample_prompts", "at least one, which may be empty")
        for prompt in self.sample_prompts:
            require(is_unicode(prompt), self, "sample_prompts", "valid Unicode, without lone surrogates")
        require_choice(self, "compute_dtype", COMPUTE)
        object.__setattr__(self, "loggers", tuple(self.loggers))
        known = all(name in LOGGERS for name in self.loggers) and len(set(self.loggers)) == len(self.loggers)
        require(known, self, "loggers", f"some of {', '.join(LOGGERS)}, each once")
        for field in ("sample_prompts", "phases"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # gin may give a list
        self._check_ramp()

    def _check_ramp(self) -> None:
        if self.batch_ramp is not None:
            object.__setattr__(self, "batch_ramp", tuple(self.batch_ramp))
            first, increment, sequences = self.batch_ramp
            fits = 0 < first < self.batch_size and increment > 0 and (self.batch_size - first) % increment == 0
            expected = f"numbers above 0, the second a divisor of batch_size - the first = {self.batch_size} - {first}"
            require(fits and sequences > 0, self, "batch_ramp", expected)

    @property
    def rates(self) -> tuple[tuple[int, float], ...]:
        """The learning rates of the phases that have one, each with the number of steps before it."""
        return tuple((phase.after, phase.learning_rate) for phase in self.phases if phase.learning_rate is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    name: muon updates the weight matrices, scaled to AdamW's step size, and AdamW everything else: vectors, embedding,
    head, convolutions. schedule: wsd holds the peak and decays over the last decay_steps as 1 - sqrt(progress)
    (Megatron's minus_sqrt). moment_dtype: arithmetic with moments is always in float32.
    """

    name: Annotated[str, "adamw, or muon for the weight matrices and AdamW for everything else"] = "adamw"
    learning_rate: Annotated[float, "peak of the schedule, the same for both optimizers"]
    schedule: Annotated[str, "cosine to min_ratio x peak, wsd (holds, then 1 - sqrt(progress)) or constant"] = "cosine"
    warmup_steps: Annotated[int, "steps of the linear rise to the peak"] = 0
    decay_steps: Annotated[int, "number of last steps, over which wsd decays"] = 0
    min_ratio: Annotated[float, "final rate of cosine and wsd, as a share of the peak"] = 0.1
    beta1: Annotated[float, "AdamW's decay of the first moment"] = 0.9
    beta2: Annotated[float, "AdamW's decay of the second moment"] = 0.95
    epsilon: Annotated[float, "AdamW's, added to the root of the second moment"] = 1e-8
    weight_decay: Annotated[float, "decoupled weight decay, multiplied by the learning rate"] = 0.1
    clip_norm: Annotated[float, "bound of the gradient's global norm"] = 1.0
    moment_dtype: Annotated[str, "dtype of moments between steps: float32 or bfloat16"] = "float32"
    trained: Annotated[
        tuple[str, ...],
        "what is trained, with its buffers: letters of the pattern, embedding, head, norm, mtp, resampler, score; "
        "empty: all",
    ] = ()
    frozen: Annotated[
        tuple[str, ...], "modules that are not trained, such as router or mtp; their buffers are still updated"
    ] = ()

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("trained", "frozen"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # gin may give a list
        require(all(self.frozen) and len(set(self.frozen)) == len(self.frozen), self, "frozen", "names, each once")
        require_choice(self, "name", ("adamw", "muon"))
        require_choice(self, "schedule", ("cosine", "wsd", "constant"))
        require_choice(self, "moment_dtype", COMPUTE)
        expected = f"letters of {''.join(LAYERS)}, or some of {', '.join(MODEL_PARTS)}"
        known = all(name in LAYERS or name in MODEL_PARTS for name in self.trained)
        require(known and len(set(self.trained)) == len(self.trained), self, "trained", expected)
        require_positive(self, "learning_rate", "epsilon", "clip_norm")
        require_not_negative(self, "warmup_steps", "decay_steps", "weight_decay")
        require(0 <= self.min_ratio <= 1, self, "min_ratio", "a number from 0 to 1")
        for field in ("beta1", "beta2"):
            require(0 <= getattr(self, field) < 1, self, field, "a number from 0 to below 1")
        if self.schedule == "wsd":
            require_positive(self, "decay_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All parts of a run. A part that the gin files do not mention, and that has required fields, is None."""

    model: ModelConfig = ABSENT
    plan: PlanConfig
    data: DataConfig = ABSENT
    train: TrainConfig = ABSENT
    optimizer: OptimizerConfig = ABSENT
    chat: ChatConfig = ABSENT
    distill: DistillConfig = ABSENT
    elastic: ElasticConfig = ABSENT
    preference: PreferenceConfig = ABSENT
    evaluate: EvaluateConfig = ABSENT
    rl: RLConfig = ABSENT
    precision: PrecisionConfig = PrecisionConfig()
    vision: VisionConfig = ABSENT
    lora: LoraConfig = ABSENT

    def __post_init__(self) -> None:
        if self.lora is not None and self.model is not None and not isinstance(self.model, AdaptedModel):
            object.__setattr__(self, "model", adapted(self.model, self.lora))

    def need(self, *parts: str) -> "RunConfig":
        """This config, if it has all of `parts`. Raises ConfigError naming the class that has no bindings."""
        for part in parts:
            if getattr(self, part) is None:
                raise ConfigError(
                    f"the gin files have no bindings of {PARTS[part].__name__}; expected some, with its fields"
                )
        return self

    def check(self) -> "RunConfig":
        """This config, if its parts fit together. Raises ConfigError."""
        if self.train is not None:
            for shape in dict.fromkeys((one.batch_size, one.sequence_length) for one in self.stretches()):
                self._check_shape(*shape)
            self.plan.require_half_precision(self.train.compute_dtype)
            whole = self.plan.stage > 1 or self.plan.microbatches % self.plan.overlapping == 0
            require(whole, self.plan, "interleave", f"a divisor of microbatches = {self.plan.microbatches}")
        if self.lora is not None and self.elastic is not None:
            raise ConfigError("LoraConfig and ElasticConfig both have bindings; expected one: masks know no adapters")
        if self.lora is not None and self.model is not None and self.model.score_head and self.optimizer is not None:
            expected = "'score' among them: a reward model's head has no adapter"
            require("score" in self.optimizer.trained, self.optimizer, "trained", expected)
        if self.model is not None:
            for field in ("remat", "offload"):
                check_layers(field, getattr(self.plan, field), self.model.layers.main + self.model.layers.mtp)
            windows = self.model.attention_sinks or set(self.model.layers.main + self.model.layers.mtp) & set("w+")
            stretches = self.stretches() if self.train is not None else ()
            shapes = dict.fromkeys((one.sequence_length, one.batch_size) for one in stretches) or {(None, None): None}
            for length, rows in shapes:
                check_precision(self.precision, self.model, self.plan, length=length, rows=rows)
            expected = "full or blocked: the model has windows, sinks or latent attention"
            require(not windows or self.plan.attention != "cudnn", self.plan, "attention", expected)
        if self.train is not None and self.train.carry_states:
            self._check_carried()
        if self.train is not None and self.data is not None and self.data.heldout_fraction == 0:
            expected = "0: DataConfig.heldout_fraction is 0, so there is nothing to compare on"
            require(self.train.ngram_order == 0, self.train, "ngram_order", expected)
        if self.train is not None and self.optimizer is not None:
            warmup, steps, end = self.optimizer.warmup_steps, self.train.steps, "TrainConfig.steps"
            if self.train.rates:  # a phase with a rate of its own ends the schedule
                steps, end = self.train.rates[0][0], "PhaseConfig.after of the first learning_rate"
            expected = f"at most {end} = {steps}: the rate would not reach its peak"
            require(warmup <= steps, self.optimizer, "warmup_steps", expected)
            if self.optimizer.schedule == "wsd":
                expected = f"at most {end} - warmup_steps = {steps} - {warmup}"
                require(warmup + self.optimizer.decay_steps <= steps, self.optimizer, "decay_steps", expected)
        if self.train is not None and self.evaluate is not None:
            between = self.train.evaluate_every
            expected = f"a multiple of TrainConfig.evaluate_every = {between}"
            require((self.evaluate.every or between) % between == 0, self.evaluate, "every", expected)
            expected = "above 0 with EvaluateConfig: a run evaluates together with its held-out loss"
            require(self.data is None or self.data.heldout_fraction > 0, self.data, "heldout_fraction", expected)
        return self

    def _check_carried(self) -> None:
        """Raises ConfigError if states cannot be carried from one batch to the next."""
        expected = "False: a teacher sees each sequence alone"
        require(self.distill is None, self.train, "carry_states", expected)
        for axis in ("context", "stage"):
            expected = "1: TrainConfig.carry_states is True"
            require(getattr(self.plan, axis) == 1, self.plan, axis, expected)
        if self.model is not None:
            expected = "False: ModelConfig.learned_positions has none beyond a sequence"
            require(self.model.learned_positions is None, self.train, "carry_states", expected)
        expected = "False: with phases, batch_ramp or DataConfig.sources, rows do not continue"
        require(not self.varies, self.train, "carry_states", expected)

    @property
    def varies(self) -> bool:
        """Whether the data has several sources, or changes its shapes or blend on the way."""
        of_data = self.data is not None and bool(self.data.sources)
        return of_data or self.train is not None and bool(self.train.phases or self.train.batch_ramp)

    def stretches(self) -> list[Stretch]:
        """The stretches of the run, in order: steps of equal shapes and blend. Raises ConfigError."""
        train, sources = self.train, self.data.sources if self.data is not None else ()
        weights = {source.name: source.weight for source in sources}
        return stretches(
            steps=train.steps, batch_size=train.batch_size, sequence_length=train.sequence_length,
            ramp=train.batch_ramp, phases=train.phases, weights=weights,
        )  # fmt: skip

    def largest(self) -> "RunConfig":
        """The run with the shape of its largest batch throughout, for estimates of memory."""
        one = max(self.stretches(), key=lambda stretch: stretch.batch_size * stretch.sequence_length)
        shape = {"batch_size": one.batch_size, "sequence_length": one.sequence_length}
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **shape, phases=(), batch_ramp=None))

    def _check_shape(self, batch_size: int, sequence_length: int) -> None:
        """Raises ConfigError unless plan and model can run a batch of this shape."""
        train = dataclasses.replace(
            self.train, batch_size=batch_size, sequence_length=sequence_length, phases=(), batch_ramp=None
        )
        parts = self.plan.data * self.plan.microbatches
        expected = f"a multiple of data x microbatches = {self.plan.data} x {self.plan.microbatches}"
        require(batch_size % parts == 0, train, "batch_size", expected)
        routed = self.model is None or "E" in self.model.layers.main + self.model.layers.mtp
        context, pieces = self.plan.context, self.plan.sequence_pieces(routed=routed)
        shared = "tensor" if routed or self.plan.stream == "time" else "1"
        name = shared if context == 1 else f"lcm(2, {shared})"
        expected = f"a multiple of context x {name} = {context} x {pieces}"
        require(sequence_length % (context * pieces) == 0, train, "sequence_length", expected)
        if self.model is not None and context > 1:
            reach = self.model.reach
            expected = f"at least 2 x context x {reach} = {2 * context * reach}: tokens read {reach} from another rank"
            require(sequence_length >= 2 * context * reach, train, "sequence_length", expected)
        if self.model is not None and self.model.learned_positions is not None:
            for field in ("sequence_length", "sample_tokens"):
                expected = f"at most ModelConfig.learned_positions = {self.model.learned_positions}"
                require(getattr(train, field) <= self.model.learned_positions, train, field, expected)


PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "plan": PlanConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "chat": ChatConfig,
    "distill": DistillConfig,
    "elastic": ElasticConfig,
    "preference": PreferenceConfig,
    "evaluate": EvaluateConfig,
    "rl": RLConfig,
    "precision": PrecisionConfig,
    "vision": VisionConfig,
    "lora": LoraConfig,
}
