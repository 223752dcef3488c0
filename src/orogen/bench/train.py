"""A model on the devices of a plan: time and memory of its forward and backward pass, or of whole steps with the
optimizer.

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

from orogen.bench.balanced import balanced_choices
from orogen.bench.cpu_train import random_batch
from orogen.bench.weights import export_weights
from orogen.bench.worker import seconds_a_run, serve
from orogen.bench.workload import Workload
from orogen.checkpoint.steps import with_shardings
from orogen.config.checks import ConfigError, require
from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.cost.flops import peak_flops, training_flops_per_token
from orogen.model.lm import Built, initial_state
from orogen.parallel import placement
from orogen.parallel.plan import Plan
from orogen.parallel.runtime import configure
from orogen.precision.policy import working_copy
from orogen.report.profile import step_table
from orogen.train import carry
from orogen.train.formats import in_formats
from orogen.train.next_token import LOSS, NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import abstract_state, state_creator, state_shardings
from orogen.train.step import batch_to_devices, gradients, make_step

WARM_UP = 2
# In lowered text, an FP8 product as precision/fp8.py writes it, with its operands behind a barrier; in compiled text,
# the custom call that XLA makes of one.
FP8_ASKED = re.compile(
    r"optimization_barrier [^:]*: tensor<\S*xf8E\w+>, tensor<f32>, tensor<\S*xf8E\w+>, tensor<f32>\s"
)
FUNCTION, CALL = re.compile(r"func\.func (?:public|private) @([^(\s]+)\("), re.compile(r"\bcall @([^(\s]+)\(")
FP8_PRODUCT = 'custom_call_target="__cublas$lt$matmul$f8"'


class Prepared(NamedTuple):
    """A compiled workload.

    start: begins one run and returns arrays that are ready when it is done. loss: mean nats per next token in the first
    run. tokens: tokens per run. memory: see `_memory`. same_bits: whether a second run gave the bits of the first; None
    if not compared. lost: assignments to experts in the first run, those that were dropped, and those that overflowed
    a buffer; None without routed experts.
    """

    start: Callable[[], Any]
    loss: float
    tokens: int
    memory: dict[str, float]
    same_bits: bool | None
    lost: tuple[int, int, int] | None


def bench(work: Workload, *, steps: int, deterministic: bool = False, profile: Path | None = None) -> dict[str, Any]:
    """Times `steps` runs of the workload, with random weights.

    deterministic: compare two runs to the bit. profile: a folder for the trace of one more run, whose table is added.
    MFU follows the convention of `cost/flops.py`.
    """
    config = work.config()
    prepared = prepare(work, config, deterministic=deterministic)
    seconds = timed(prepared.start, steps)
    if profile:
        with jax.profiler.trace(str(profile)):
            jax.block_until_ready(prepared.start())
    facts = {**describe(work, config), work.part: summarise(prepared, seconds, config)}
    return {**facts, "profile": step_table(profile, steps=1)} if profile else facts


def describe(work: Workload, config: RunConfig) -> dict[str, Any]:
    """What was run, and on which device."""
    facts: dict[str, Any] = {
        "bench": "train", "model": work.model, "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "devices": config.plan.devices, "rows": config.train.batch_size // work.microbatches(config.plan),
        "sequence_length": config.train.sequence_length,
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


def prepare(
    work: Workload, config: RunConfig, *, deterministic: bool = False, export: Path | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Prepared:  # fmt: skip
    """Compiles the workload and runs it once. export: a folder to write the weights to, in Hugging Face's format.
    ready: called when the workload is compiled, before it runs and before the state of a whole step is allocated."""
    require_gpu(config.plan)
    chosen = dataclasses.replace(config.plan, microbatches=work.microbatches(config.plan))
    plan, built = assemble(config.model, chosen, length=config.train.sequence_length)
    plan = in_formats(plan, config.precision, config.model)
    batch = batch_to_devices(_batch(config), plan)
    replay = balanced_choices(built, plan, config) if work.routing == "balanced" else None
    if work.part == "whole_step":
        return _whole_step(built, config, plan, (batch, replay), ready=ready)
    params, buffers = _working_state(config.model, built, plan, config.train.compute_dtype)
    if export is not None:
        export_weights(config.model, params, buffers, export)
    given = params, buffers, batch, replay
    program = _compiled(_pass(built, config, plan, replaying=replay is not None).lower(*given), plan)
    ready()
    first = program(*given)
    loss, lost = _mean_nats(first[3].metrics[LOSS], first[2].metrics[LOSS]), _lost(first[3].load, first[3])
    same = _same_bits(first, program(*given)) if deterministic else None
    del first

    def start() -> Any:
        return program(*given)[3].metrics  # the gradients are released

    return Prepared(start, loss, _tokens(config), _memory(program), same, lost)


def _pass(built: Built, config: RunConfig, plan: Plan, *, replaying: bool = False) -> Any:
    """The jitted forward and backward pass, of (params, buffers, batch, replay)."""
    gradient = gradients(built, NEXT_TOKENS, config.model, plan, config.train.compute_dtype, replaying=replaying)

    def function(params: Any, *arguments: Any) -> Any:
        return gradient(placement.working(params, plan), *arguments)

    return jax.jit(function, compiler_options=plan.compiler_options)


def pass_to_compile(config: RunConfig, devices: Sequence[Any] | None = None) -> tuple[Any, tuple[Any, ...]]:
    """The jitted pass of `config` on one device, and the shapes of its arguments; nothing is allocated.
    devices: to compile for; None: this process's."""
    plan, built = assemble(config.model, config.plan, length=config.train.sequence_length, devices=devices)
    plan = in_formats(plan, config.precision, config.model)
    state = jax.eval_shape(lambda: _create(config.model, built, config.train.compute_dtype))
    given = (*state, jax.eval_shape(lambda: batch_to_devices(_batch(config), plan)), None)
    return _pass(built, config, plan), given


def _whole_step(
    built: Built, config: RunConfig, plan: Plan, given: tuple[Any, Any], *, ready: Callable[[], None]
) -> Prepared:  # fmt: skip
    optimizer = make_optimizer(config.optimizer, config.train.steps, built.params)
    carried, (batch, replay) = carry.abstract(config.train, built), given
    abstract = abstract_state(built, optimizer, carried)
    abstract = with_shardings(abstract, state_shardings(abstract, plan))
    step = make_step(built, NEXT_TOKENS, config, plan, optimizer, replaying=replay is not None)
    program = _compiled(step.lower(abstract, batch, None, replay), plan)
    seed = config.train.seed
    create = state_creator(config.model, built, optimizer, plan, carried=carried).lower(seed).compile()
    ready()
    state = create(seed)
    state, metrics = program(state, batch, None, replay)
    loss, lost = _mean_nats(*metrics.metrics[LOSS]), _lost(metrics.load_le, metrics)

    def start() -> Any:
        nonlocal state
        state, metrics = program(state, batch, None, replay)
        return metrics

    return Prepared(start, loss, _tokens(config), _memory(program), None, lost)


def _tokens(config: RunConfig) -> int:
    return config.train.batch_size * config.train.sequence_length


def _lost(load: Any, counted: Any) -> tuple[int, int, int] | None:
    """`Prepared.lost`, of the loads of all experts and the counts in StepMetrics or Sums."""
    assigned = sum(int(part.sum()) for part in jax.tree.leaves(load))
    return (assigned, int(counted.dropped), int(counted.overflow)) if assigned else None


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


def _batch(config: RunConfig) -> Any:
    """A batch with one document per sequence; the sequences of the first microbatch come first."""
    return random_batch(config.model.vocab_size, config.train.batch_size, config.train.sequence_length)


def _working_state(model: ModelConfig, built: Built, plan: Plan, dtype: str) -> tuple[Any, Any]:
    """Random parameters in the compute dtype, and buffers, as the plan stores them."""

    create = functools.partial(_create, model, built, dtype)
    return jax.jit(create, out_shardings=placement.shardings((built.params, built.buffers), plan))()


def _create(model: ModelConfig, built: Built, dtype: str) -> tuple[Any, Any]:
    params, buffers = initial_state(model, 0)
    return working_copy(built.laid(params), dtype), built.laid(buffers)


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


def summarise(prepared: Prepared, seconds: Sequence[float], config: RunConfig) -> dict[str, Any]:
    """The loss, then times, rates and memory; and the share of assignments to experts that was lost, if any was."""
    facts: dict[str, Any] = {"loss": prepared.loss}
    if prepared.same_bits is not None:
        facts["same_bits"] = prepared.same_bits
    if prepared.lost is not None and any(prepared.lost[1:]):
        assigned, dropped, overflow = prepared.lost
        facts |= {"dropped": round(dropped / assigned, 4), "overflow": round(overflow / assigned, 4)}
    timed = rates(
        seconds, prepared.tokens, config.model, config.train.sequence_length, devices=config.plan.devices
    )  # fmt: skip
    return {**facts, **timed, **prepared.memory}


def rates(
    seconds: Sequence[float], tokens: int, model: ModelConfig, length: int, *, devices: int = 1
) -> dict[str, Any]:
    """Milliseconds, tokens per second, and the model's TFLOP/s and MFU, both per device, at the median."""
    median = statistics.median(seconds)
    achieved = tokens * training_flops_per_token(model, length) / median / devices
    peak = peak_flops(jax.devices()[0].device_kind)
    each = {"tokens_per_second_per_device": round(tokens / median / devices)} if devices > 1 else {}
    return {
        "ms": round(median * 1e3, 2), "best_ms": round(min(seconds) * 1e3, 2), "worst_ms": round(max(seconds) * 1e3, 2),
        "tokens_per_second": round(tokens / median), **each, "tflops": round(achieved / 1e12, 1),
        "mfu": None if peak is None else round(achieved / peak, 4),
    }  # fmt: skip


def _memory(compiled: Any) -> dict[str, float]:
    """GB that the program holds at most on one device: arguments, results that alias no argument, and temporaries."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return {"gb": round(held / 1e9, 2), "temporary_gb": round(plan.temp_size_in_bytes / 1e9, 2)}


def _serve(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The process's side, for `serve`. settings: `work`, the fields of a Workload; `weights` and `tokens`, where to
    write them, or None; `deterministic`, as in `prepare`."""
    work = Workload(**{**settings["work"], "bindings": tuple(settings["work"]["bindings"])})
    config = work.config()
    if settings["tokens"] is not None:
        np.save(settings["tokens"], _batch(config).tokens_bt)
    export = None if settings["weights"] is None else Path(settings["weights"])
    prepared = prepare(work, config, deterministic=settings["deterministic"], export=export)

    def answer(question: Any) -> Any:
        return summarise(prepared, timed(prepared.start, question["time"]), config)

    return {**describe(work, config), "loss": prepared.loss}, answer


if __name__ == "__main__":
    configure()
    serve(_serve)
