"""Whole training steps on this CPU, on one device in float32; Orogen and a peer take turns.

Letters: b batch, t time.
"""

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orogen.bench.peers import Peer, Seconds, require_peer, timed
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.precision import PrecisionConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.config.shipped import SHIPPED
from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.train.formats import in_formats
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

MODELS = ("dense", "moe")
CONFIGS = SHIPPED / "models"
WARM_UP = 2  # steps of each program before any is counted


def bench(models: Sequence[str], *, peer: str | None, steps: int, threads: int = 2) -> dict[str, Any]:
    """Tokens per second of each of `models`, and of the peer if one is named, with the ratio of the two.

    Call it before jax starts its backend, which fixes the number of threads. Raises ConfigError on an unknown model or
    peer, a peer that is not installed, or fewer processors than threads.
    """
    unknown = [name for name in models if name not in MODELS]
    if unknown:
        raise ConfigError(f"--models has {unknown[0]!r}; expected some of {', '.join(MODELS)}")
    if peer is not None:
        require_peer(peer)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processors < threads:
        raise ConfigError(f"cpu_train runs {threads} threads; expected at least as many processors, found {processors}")
    os.environ["NPROC"] = str(threads)  # the size of XLA:CPU's pools
    jax.config.update("jax_platforms", "cpu")
    configs = {name: load([CONFIGS / f"bench_{name}.gin"])[0].model for name in models}
    facts: dict[str, Any] = {"bench": "cpu_train", "cpu": _cpu(), "dtype": "float32", "jax": jax.__version__}
    return {**facts, "models": {name: compare(config, peer=peer, steps=steps, threads=threads)
                                for name, config in configs.items()}}  # fmt: skip


def compare(
    model: ModelConfig, *, peer: str | None, steps: int, threads: int, batch_size: int = 2, sequence_length: int = 512
) -> dict[str, Any]:
    """Times `steps` training steps of `model`, each followed by one of the peer's. Times are seconds per step."""
    tokens = batch_size * sequence_length
    shape: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length}
    started = time.perf_counter()
    step, parameters = training_step(model, **shape)
    step()
    compiled = time.perf_counter() - started
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Peer(model, **shape, threads=threads)) if peer else None
        rounds = [(timed(step), other.step() if other else None) for _ in range(WARM_UP + steps)][WARM_UP:]
    ours = [mine for mine, _ in rounds]
    facts: dict[str, Any] = {
        "pattern": model.pattern, **shape,
        "orogen": {"parameters": parameters, "threads": threads, "start_seconds": round(compiled, 2),
                   **_summary(ours, tokens)},
    }  # fmt: skip
    if other and peer:
        theirs = [seconds for _, seconds in rounds if seconds]
        facts[peer] = {**other.facts, **_summary(theirs, tokens)}
        facts["ratio"] = _ratio(ours, theirs, "wall")
        facts["cpu_ratio"] = _ratio(ours, theirs, "cpu")
    return facts


def training_step(
    model: ModelConfig, *, batch_size: int, sequence_length: int, dtype: str = "float32",
    precision: PrecisionConfig | None = None,
) -> tuple[Callable[[], None], int]:  # fmt: skip
    """A function that takes one training step on a fixed random batch, and the number of parameters. The function keeps
    the state for its next call."""
    shape: dict[str, Any] = {"batch_size": batch_size, "sequence_length": sequence_length}
    train = TrainConfig(steps=1000, **shape, seed=0, compute_dtype=dtype)
    optimizer_config = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    precision = precision or PrecisionConfig()
    config = RunConfig(model=model, plan=PlanConfig(), train=train, optimizer=optimizer_config, precision=precision)
    plan, built = in_formats(make_plan(config.plan, model), config.check().precision, model), build(model)
    optimizer = make_optimizer(optimizer_config, train.steps, built.params)
    run = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    state = create_state(model, built, optimizer, plan, train.seed)
    batch = batch_to_devices(random_batch(model.vocab_size, batch_size, sequence_length), plan)

    def step() -> None:
        nonlocal state
        state, metrics = run(state, batch)
        jax.block_until_ready((state, metrics))

    return step, sum(leaf.size for leaf in jax.tree.leaves(state.params))


def random_batch(vocab_size: int, batch_size: int, sequence_length: int) -> Batch:
    """A random batch with one document per row."""
    shape = (batch_size, sequence_length)
    tokens_bt = np.random.default_rng(0).integers(vocab_size, size=shape, dtype=np.int32)
    positions_bt = np.broadcast_to(np.arange(sequence_length, dtype=np.int32), shape)
    return Batch(tokens_bt, np.ones(shape, np.int32), positions_bt, np.ones(shape, np.float32))


def _summary(samples: Sequence[Seconds], tokens: int) -> dict[str, Any]:
    wall = [s.wall for s in samples]
    low, middle, high = _quartiles(wall)
    return {
        "tokens_per_second": round(tokens / middle, 1),
        "median": round(middle, 6),
        "quartiles": [round(low, 6), round(high, 6)],
        "best": round(min(wall), 6),
        "cpu": round(statistics.median(s.cpu for s in samples), 6),
        "steps": len(samples),
    }


def _ratio(ours: Sequence[Seconds], theirs: Sequence[Seconds], clock: str) -> dict[str, Any]:
    """How many times faster Orogen is: median and quartiles over pairs of neighbouring steps."""
    ratios = [getattr(other, clock) / getattr(mine, clock) for mine, other in zip(ours, theirs, strict=True)]
    low, middle, high = _quartiles(ratios)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
