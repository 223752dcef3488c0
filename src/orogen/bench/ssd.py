"""The Mamba-2 recurrence at the sizes of Nemotron-3 Nano and Super: time and memory of our implementations.

Letters: b batch, t time, h heads, p head size, g groups, n state.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp

from orogen.config.checks import ConfigError
from orogen.kernels.ssd import IMPLEMENTATIONS, ssd

SHAPES = {
    "nano": {"b": 2, "t": 8192, "h": 64, "p": 64, "g": 8, "n": 128},
    "super": {"b": 2, "t": 8192, "h": 128, "p": 64, "g": 8, "n": 128},
}
CHUNK_SIZE = 128
CALLS = 10  # a sample; only the last is waited for, so that the host's own time hides behind the device's


def bench(implementations: Sequence[str], *, samples: int) -> list[dict[str, Any]]:
    """One record a shape and implementation: milliseconds and MB of the forward pass and of it with its gradient.

    bfloat16 operands, no segments, the gradient of x, dt, a, B and C. Temporary memory is what the compiler plans
    beside arguments and results. Raises ConfigError on an unknown implementation.
    """
    unknown = [name for name in implementations if name not in IMPLEMENTATIONS]
    if unknown:
        raise ConfigError(f"implementation {unknown[0]!r}; expected some of {', '.join(sorted(IMPLEMENTATIONS))}")
    device = jax.devices()[0].device_kind
    return [
        {
            "bench": "ssd", "device": f"one {device}", "jax": jax.__version__, "dtype": "bfloat16",
            "shape": name, **shape, "chunk_size": CHUNK_SIZE, "implementation": implementation,
            **_measure(shape, implementation, samples),
        }
        for name, shape in SHAPES.items()
        for implementation in implementations
    ]  # fmt: skip


def _measure(shape: dict[str, int], implementation: str, samples: int) -> dict[str, Any]:
    operands, dy_bthp = _draw(**shape)

    def forward(operands: tuple[Array, ...]) -> Array:
        return ssd(*operands, chunk_size=CHUNK_SIZE, implementation=implementation)[0]  # pyright: ignore

    def both(operands: tuple[Array, ...], dy_bthp: Array) -> Any:
        return jax.vjp(forward, operands)[1](dy_bthp)

    return {
        "forward": _timed(jax.jit(forward), (operands,), samples),
        "forward_backward": _timed(jax.jit(both), (operands, dy_bthp), samples),
    }


def _timed(function: Callable[..., Any], arguments: tuple[Any, ...], samples: int) -> dict[str, Any]:
    compiled = function.lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    milliseconds = []
    for _ in range(samples):
        started = time.perf_counter()
        for _ in range(CALLS - 1):
            compiled(*arguments)
        jax.block_until_ready(compiled(*arguments))
        milliseconds.append((time.perf_counter() - started) / CALLS * 1e3)
    return {
        "ms": round(statistics.median(milliseconds), 4),
        "best_ms": round(min(milliseconds), 4),
        "worst_ms": round(max(milliseconds), 4),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
    }


def _draw(*, b: int, t: int, h: int, p: int, g: int, n: int) -> tuple[tuple[Array, ...], Array]:
    """x, dt, a, B, C, and the gradient of the outputs."""
    rng = np.random.default_rng(0)
    normal = lambda *size: jnp.asarray(rng.normal(size=size), jnp.bfloat16)  # noqa: E731
    dt_bth = jnp.asarray(np.log1p(np.exp(rng.normal(size=(b, t, h)) * 1.5 - 3)), jnp.float32)
    a_h = jnp.asarray(-rng.uniform(1, 16, h), jnp.float32)
    return (normal(b, t, h, p), dt_bth, a_h, normal(b, t, g, n), normal(b, t, g, n)), normal(b, t, h, p)
