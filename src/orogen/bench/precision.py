"""What emulated recipes cost: whole training steps in bfloat16 with and without them, in turn, on one device."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

from orogen.bench.cpu_train import CONFIGS, training_step
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.precision import PLAIN, RECIPE_NAMES, PrecisionConfig

ROWS, LENGTH = 2, 256  # sequences, and tokens of each


def bench(recipes: Sequence[str], *, model: str, steps: int) -> dict[str, Any]:
    """Milliseconds per step of each recipe and of bfloat16, and their ratio, for the model of a file in
    gin_configs/models. Raises ConfigError on an unknown recipe or model."""
    if unknown := [name for name in recipes if name not in RECIPE_NAMES]:
        raise ConfigError(f"--recipes has {unknown[0]!r}; expected some of {', '.join(RECIPE_NAMES)}")
    config = load([CONFIGS / f"{model}.gin"])[0].need("model").model
    shape: dict[str, Any] = {"batch_size": ROWS, "sequence_length": LENGTH, "dtype": "bfloat16"}
    programs, compiling = {}, {}
    for name in dict.fromkeys((PLAIN, *recipes)):
        began = time.perf_counter()
        programs[name], parameters = training_step(config, **shape, precision=PrecisionConfig(recipe=name))
        programs[name]()
        compiling[name] = time.perf_counter() - began
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(steps):
        for name, step in programs.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    plain = times[PLAIN]
    return {
        "bench": "precision", "model": model, "parameters": parameters, "tokens": ROWS * LENGTH,
        "device": jax.devices()[0].device_kind,
        "recipes": {
            name: {
                "ms": round(1e3 * statistics.median(taken), 2),
                "ratio": round(statistics.median(a / b for a, b in zip(taken, plain, strict=True)), 3),
                "first_step_s": round(compiling[name], 1),
            }
            for name, taken in times.items()
        },
    }  # fmt: skip
