"""A model on one GPU: time and memory of its forward and backward pass, or of whole steps with the optimizer.

`python -m orogen.bench.train` does the same as a process that answers with its loss and times (see
orogen.bench.worker). Letters: b batch, t time.
"""

import dataclasses
import functools
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from orogen.bench.cpu_train import CONFIGS, random_batch
from orogen.bench.weights import export_weights
from orogen.bench.worker import seconds_a_run, serve
from orogen.config.checks import ConfigError, require
from orogen.config.load import load, parse
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.reads import unread
from orogen.config.run import RunConfig
from orogen.cost.flops import peak_flops, training_flops_per_token
from orogen.model.lm import build, initial_state
from orogen.parallel import placement
from orogen.parallel.plan import Plan, make_plan
from orogen.parallel.runtime import asks_for_same_bits, configure
from orogen.precision.policy import working_copy
from orogen.train import carry
from orogen.train.next_token import LOSS, NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, gradients, make_step

WARM_UP = 2
# Default bindings of the benchmark, which those of the command override.
PASS = {
    **{f"PlanConfig.{field}": repr(kernel) for field, kernel in FOR_GPU.items()},
    "PlanConfig.unroll": "3", "PlanConfig.logit_rows": "4096",
    "PlanConfig.remat": "'elementwise'", "TrainConfig.compute_dtype": "'bfloat16'",
}  # fmt: skip
# In lowered text, an FP8 product as precision/fp8.py writes it, with its operands behind a barrier; in compiled text,
# the custom call that XLA makes of one.
FP8_ASKED = re.compile(
    r"optimization_barrier [^:]*: tensor<\S*xf8E\w+>, tensor<f32>, tensor<\S*xf8E\w+>, tensor<f32>\s"
)
FUNCTION, CALL = re.compile(r"func\.func (?:public|private) @([^(\s]+)\("), re.compile(r"\bcall @([^(\s]+)\(")
FP8_PRODUCT = 'custom_call_target="__cublas$lt$matmul$f8"'
# Fields that options set, so that bindings may not.
OPTIONS = {
    "TrainConfig.sequence_length": "--sequence_length", "TrainConfig.batch_size": "--rows, and PlanConfig.microbatches",
}  # fmt: skip
# Tokens per microbatch, unless the number of its sequences is given.
TOKENS = 16384
# In whole steps, and with more than LONG tokens per microbatch, memory is short: matrix products are kept and cheap
# intermediates are recomputed, by letter. R1 then keeps 12 GB instead of 21, beside a state of 26 GB and accumulated
# gradients; hybrid_1b at 65,536 tokens keeps 59 GB instead of 85, on a device that has 80 (`cost/activations.py`).
LONG = 32768
CHEAP = {
    "M": "M:norm,conv,gated_norm", "-": "-:norm,activation", "E": "E:norm,rows,expert_activation,shared_activation",
}  # fmt: skip
STEP = {
    "PlanConfig.microbatches": "4", "OptimizerConfig.learning_rate": "1e-4", "OptimizerConfig.schedule": "'constant'",
    "OptimizerConfig.moment_dtype": "'bfloat16'",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed.

    model: the stem of a file in gin_configs/models. rows: sequences per microbatch; None: as many as hold TOKENS, at
    least one. sequence_length: tokens per sequence. part: `forward_backward`, of one microbatch with parameters in the
    compute dtype, or `whole_step`. bindings: gin bindings that override the benchmark's. If XLA is asked for the same
    bits in every run, attention is `blocked`.
    """

    model: str = "r1"
    rows: int | None = None
    sequence_length: int = 8192
    part: str = "forward_backward"
    bindings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch."""
        return self.sequence_length * (self.rows or max(1, TOKENS // self.sequence_length))

    def config(self) -> RunConfig:
        """The configuration of a run with this workload as its step. Raises ConfigError."""
        file = CONFIGS / f"{self.model}.gin"
        if not file.is_file():
            raise ConfigError(f"--model {self.model!r}; expected the name of a file in {CONFIGS}")
        length = self.sequence_length
        fixed = {"TrainConfig.steps": 1000, "TrainConfig.seed": 0, "TrainConfig.sequence_length": length}
        defaults = {**PASS, **(STEP if self.part == "whole_step" else {}), **fixed}
        if asks_for_same_bits():
            defaults["PlanConfig.attention"] = "'blocked'"
        # The batch size depends on the number of microbatches, and recomputation on the pattern. The bindings may
        # change both, so they are parsed first.
        first, _ = parse([file], [*_bindings(defaults, self.bindings), f"TrainConfig.batch_size={2**20}"])
        require(first.plan.devices == 1, first.plan, "devices", "1: the benchmark runs on one device")
        for setting in unread(first):  # kernels of layers that the model lacks
            defaults.pop(setting.name, None)
        entries = tuple(entry for letter, entry in CHEAP.items() if letter in first.model.layers.main)
        if entries and (self.part == "whole_step" or self.tokens > LONG):
            defaults["PlanConfig.remat"] = repr(entries)
        microbatches = first.plan.microbatches if self.part == "whole_step" else 1
        defaults["TrainConfig.batch_size"] = self.tokens // self.sequence_length * microbatches
        return load([file], _bindings(defaults, self.bindings))[0]


def _bindings(defaults: dict[str, Any], asked: Sequence[str]) -> list[str]:
    """`asked`, and before it the defaults that it does not override. Raises ConfigError if it binds a field that an
    option sets."""
    taken = {binding.partition("=")[0].strip() for binding in asked}
    for name, option in OPTIONS.items():
        if name in taken:
            raise ConfigError(f"--gin_bindings {name}; expected {option}")
    return [f"{name}={value}" for name, value in defaults.items() if name not in taken] + list(asked)


class Prepared(NamedTuple):
    """A compiled workload.

    start: begins one run and returns arrays that are ready when it is done. loss: mean nats per next token in the first
    run. tokens: tokens per run. memory: see `_memory`. same_bits: whether a second run gave the bits of the first; None
    if not compared.
    """

    start: Callable[[], Any]
    loss: float
    tokens: int
    memory: dict[str, float]
    same_bits: bool | None


def bench(work: Workload, *, steps: int, deterministic: bool = False, profile: Path | None = None) -> dict[str, Any]:
    """Times `steps` runs of the workload, with random weights.

    deterministic: compare two runs to the bit. profile: a folder for the trace of one more run. MFU follows the
    convention of `cost/flops.py`.
    """
    config = work.config()
    prepared = prepare(work, config, deterministic=deterministic)
    seconds = timed(prepared.start, steps)
    if profile:
        with jax.profiler.trace(str(profile)):
            jax.block_until_ready(prepared.start())
    return {**describe(work, config), work.part: summarise(prepared, seconds, config.model, work.sequence_length)}


def describe(work: Workload, config: RunConfig) -> dict[str, Any]:
    """What was run, and on which device."""
    facts: dict[str, Any] = {
        "bench": "train", "model": work.model, "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "rows": work.tokens // work.sequence_length, "sequence_length": work.sequence_length,
        "plan": _changes(config.plan, PlanConfig()),
    }  # fmt: skip
    if work.part == "whole_step":
        facts["moment_dtype"] = config.optimizer.moment_dtype
    return facts


def _changes(plan: PlanConfig, default: PlanConfig) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(plan))
    return {name: getattr(plan, name) for name in fields if getattr(plan, name) != getattr(default, name)}


def require_gpu(plan: PlanConfig) -> None:
    """Raises ConfigError if the plan names kernels that need a GPU and there is none."""
    names = [f"PlanConfig.{field}" for field, name in FOR_GPU.items() if getattr(plan, field) == name]
    if names and jax.default_backend() != "gpu":
        raise ConfigError(
            f"train runs on a GPU of compute capability 9.0 (Hopper), found {jax.default_backend()}; expected other "
            f"choices of {', '.join(names)} there"
        )


def prepare(work: Workload, config: RunConfig, *, deterministic: bool = False, export: Path | None = None) -> Prepared:
    """Compiles the workload and runs it once. export: a folder to write the weights to, in Hugging Face's format."""
    require_gpu(config.plan)
    plan, built = make_plan(config.plan, config.model), build(config.model)
    batch = batch_to_devices(_batch(work, config), plan)
    if work.part == "whole_step":
        return _whole_step(built, config, plan, batch)
    params, buffers = _working_state(config.model, plan, config.train.compute_dtype)
    if export is not None:
        export_weights(config.model, params, buffers, export)
    one = make_plan(dataclasses.replace(config.plan, microbatches=1), config.model)
    function = gradients(built, NEXT_TOKENS, config.model, one, config.train.compute_dtype)
    program = _compiled(jax.jit(function, compiler_options=one.compiler_options).lower(params, buffers, batch), one)
    first = program(params, buffers, batch)
    loss = _mean_nats(first[3].metrics[LOSS], first[2].metrics[LOSS])
    same = _same_bits(first, program(params, buffers, batch)) if deterministic else None
    del first

    def start() -> Any:
        return program(params, buffers, batch)[3].metrics  # the gradients are released

    return Prepared(start, loss, work.tokens, _memory(program), same)


def _whole_step(built: Any, config: RunConfig, plan: Plan, batch: Any) -> Prepared:
    optimizer = make_optimizer(config.optimizer, config.train.steps, built.params)
    carried = carry.abstract(config.train, built)
    state = create_state(config.model, built, optimizer, plan, config.train.seed, carried=carried)
    program = _compiled(make_step(built, NEXT_TOKENS, config, plan, optimizer).lower(state, batch), plan)
    state, metrics = program(state, batch)
    loss = _mean_nats(*metrics.metrics[LOSS])

    def start() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    tokens = config.train.batch_size * config.train.sequence_length
    return Prepared(start, loss, tokens, _memory(program), None)


def _compiled(lowered: Any, plan: Plan) -> Any:
    """The compiled program. Raises ConfigError if XLA on a GPU computes an FP8 product in more bits, which only the
    speed would show."""
    program = lowered.compile()
    if plan.config.linear == "fp8" and jax.default_backend() == "gpu":
        asked, found = _fp8_asked(lowered.as_text()), program.as_text().count(FP8_PRODUCT)
        expected = f"plain: {jax.devices()[0].device_kind} compiled {found} of {asked} products in FP8"
        require(0 < asked <= found, plan.config, "linear", expected)
    return program


def _fp8_asked(text: str) -> int:
    """The number of FP8 products in a lowered program; those of a function count at each of its calls."""
    name_and_body = FUNCTION.split(text)[1:]
    bodies = dict(zip(name_and_body[::2], name_and_body[1::2], strict=True))

    @functools.cache
    def asked(name: str) -> int:
        return len(FP8_ASKED.findall(bodies[name])) + sum(map(asked, CALL.findall(bodies[name])))

    return asked("main")


def _batch(work: Workload, config: RunConfig) -> Any:
    """A batch with one document per sequence; the sequences of the first microbatch come first."""
    return random_batch(config.model.vocab_size, config.train.batch_size, work.sequence_length)


def _working_state(model: ModelConfig, plan: Plan, dtype: str) -> tuple[Any, Any]:
    """Random parameters in the compute dtype, and buffers."""

    def create() -> tuple[Any, Any]:
        params, buffers = initial_state(model, 0)
        return working_copy(params, dtype), buffers

    built = build(model)
    return jax.jit(create, out_shardings=placement.shardings((built.params, built.buffers), plan))()


def _mean_nats(nats: Any, targets: Any) -> float:
    return float(nats / targets)


def _same_bits(first: Any, second: Any) -> bool:
    same = jax.jit(lambda a, b: jax.tree.reduce(lambda x, y: x & y, jax.tree.map(lambda x, y: (x == y).all(), a, b)))
    return bool(same(first[:2], second[:2]))


def timed(start: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each of `steps` runs, after WARM_UP runs that are not timed."""
    for _ in range(WARM_UP):
        jax.block_until_ready(start())
    return seconds_a_run(start, jax.block_until_ready, steps)


def summarise(prepared: Prepared, seconds: Sequence[float], model: ModelConfig, length: int) -> dict[str, Any]:
    """The loss, then times, rates and memory."""
    same = {} if prepared.same_bits is None else {"same_bits": prepared.same_bits}
    return {"loss": prepared.loss, **same, **rates(seconds, prepared.tokens, model, length), **prepared.memory}


def rates(seconds: Sequence[float], tokens: int, model: ModelConfig, length: int) -> dict[str, Any]:
    """Milliseconds, tokens per second, and the model's TFLOP/s and MFU at the median."""
    median = statistics.median(seconds)
    achieved = tokens * training_flops_per_token(model, length) / median
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "ms": round(median * 1e3, 2), "best_ms": round(min(seconds) * 1e3, 2), "worst_ms": round(max(seconds) * 1e3, 2),
        "tokens_per_second": round(tokens / median), "tflops": round(achieved / 1e12, 1),
        "mfu": None if peak is None else round(achieved / peak, 4),
    }  # fmt: skip


def _memory(compiled: Any) -> dict[str, float]:
    """GB that the program holds at most: arguments, results that alias no argument, and temporaries."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return {"gb": round(held / 1e9, 2), "temporary_gb": round(plan.temp_size_in_bytes / 1e9, 2)}


def _serve(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The process's side, for `serve`. settings: `work`, the fields of a Workload; `weights` and `tokens`, where to
    write them, or None; `deterministic`, as in `prepare`."""
    work = Workload(**{**settings["work"], "bindings": tuple(settings["work"]["bindings"])})
    config = work.config()
    if settings["tokens"] is not None:
        np.save(settings["tokens"], _batch(work, config).tokens_bt)
    export = None if settings["weights"] is None else Path(settings["weights"])
    prepared = prepare(work, config, deterministic=settings["deterministic"], export=export)

    def answer(question: Any) -> Any:
        return summarise(prepared, timed(prepared.start, question["time"]), config.model, work.sequence_length)

    return {**describe(work, config), "loss": prepared.loss}, answer


if __name__ == "__main__":
    configure()
    serve(_serve)
