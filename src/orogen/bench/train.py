"""Model R1 on one GPU: time and memory of its forward and backward pass.

Letters: b batch, t time.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from orogen.bench.cpu_train import CONFIGS, random_batch
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import Plan, make_plan
from orogen.precision.policy import working_copy
from orogen.simulate.flops import peak_flops, training_flops_per_token
from orogen.train.step import batch_to_devices, gradients

MODEL = CONFIGS / "r1.gin"
ROWS, LENGTH = 2, 8192
PLAN = PlanConfig(
    attention="cudnn",
    ssd="triton",
    causal_conv1d="triton",
    rms_norm="triton",
    grouped_matmul="mosaic",
    permutation="triton",
    unroll=3,
    logit_rows=4096,
    remat="elementwise",
)
WARM_UP = 2


def bench(*, steps: int, plan: PlanConfig = PLAN, profile: Path | None = None) -> dict[str, Any]:
    """Times of forward and backward passes of R1 on 2 x 8192 tokens, with bfloat16 weights and gradients.

    Weights are random. With `profile`, a trace is written there. MFU by the convention of `simulate/flops.py`.
    """
    if jax.default_backend() != "gpu":
        raise ConfigError(f"train runs on a GPU of compute capability 9.0 (Hopper), found {jax.default_backend()}")
    model = load([MODEL])[0].model
    return {
        "bench": "train", "model": MODEL.stem, "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "rows": ROWS, "sequence_length": LENGTH, "plan": _changes(plan),
        "forward_backward": _forward_backward(model, plan, steps, profile),
    }  # fmt: skip


def _changes(plan: PlanConfig) -> dict[str, Any]:
    default = PlanConfig()
    fields = (field.name for field in dataclasses.fields(plan))
    return {name: getattr(plan, name) for name in fields if getattr(plan, name) != getattr(default, name)}


def _forward_backward(model: ModelConfig, config: PlanConfig, steps: int, profile: Path | None) -> dict[str, Any]:
    plan, built = make_plan(config, model), build(model)
    params, buffers = _working_state(model, plan)
    batch = batch_to_devices(random_batch(model.vocab_size, ROWS, LENGTH), plan)
    run = jax.jit(gradients(built, model, plan, "bfloat16")).lower(params, buffers, batch).compile()
    loss = float(run(params, buffers, batch)[0])
    if profile is not None:
        with jax.profiler.trace(str(profile)):
            jax.block_until_ready(run(params, buffers, batch))
    seconds = _timed(lambda: run(params, buffers, batch), steps)
    return {"loss": loss, **_summary(seconds, ROWS * LENGTH, model), **_memory(run)}


def _working_state(model: ModelConfig, plan: Plan) -> tuple[Any, Any]:
    """Random parameters in bfloat16, and buffers."""

    def create() -> tuple[Any, Any]:
        params, buffers = initial_state(model, 0)
        return working_copy(params, "bfloat16"), buffers

    built = build(model)
    return jax.jit(create, out_shardings=(plan.shardings(built.params), plan.shardings(built.buffers)))()


def _timed(function: Callable[[], Any], steps: int) -> list[float]:
    """Seconds of each call after the first few."""
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def _summary(seconds: list[float], tokens: int, model: ModelConfig) -> dict[str, Any]:
    median = statistics.median(seconds)
    achieved = tokens * training_flops_per_token(model, LENGTH) / median
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "ms": round(median * 1e3, 2), "best_ms": round(min(seconds) * 1e3, 2), "worst_ms": round(max(seconds) * 1e3, 2),
        "tokens_per_second": round(tokens / median), "tflops": round(achieved / 1e12, 1),
        "mfu": None if peak is None else round(achieved / peak, 4),
    }  # fmt: skip


def _memory(compiled: Any) -> dict[str, float]:
    """GB that the program holds at most: arguments, results that take no argument's place, and temporaries."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return {"gb": round(held / 1e9, 2), "temporary_gb": round(plan.temp_size_in_bytes / 1e9, 2)}
