"""Detects processes of a run that are slower than the others.

All processes take a step together, so each step lasts as long as the slowest process needs. What differs is measured
separately: the time that a host takes to prepare a batch and dispatch a step, and the time that its devices take for a
fixed product. Letters: p process.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# A process is slow if a time of its own exceeds the median of all processes by this factor, and by this part of a step.
SLOWER, OF_STEP = 1.25, 0.05
KEPT_STEPS = 100
# The product that devices compute alone: a few milliseconds on a CPU core, less on a GPU.
SIZE, TIMES, TRIES = 512, 8, 3


def slow(times: Mapping[str, Sequence[float]], step_seconds: float) -> dict[int, str]:
    """By process, what makes it slow. times: by what was measured, one number of seconds per process."""
    found: dict[int, list[str]] = {}
    for what, seconds_p in times.items():
        usual = statistics.median(seconds_p)
        for process, seconds in enumerate(seconds_p):
            if seconds > SLOWER * usual and seconds - usual > OF_STEP * step_seconds:
                reason = f"{what} takes {1e3 * seconds:.1f} ms, the median process's {1e3 * usual:.1f} ms"
                found.setdefault(process, []).append(reason)
    return {process: ", ".join(reasons) for process, reasons in sorted(found.items())}


class Pace:
    """Collects this process's times, and compares them with the others'. With one process it does nothing."""

    def __init__(self, log: Callable[[str], None]):
        self._log = log
        self._steps: deque[float] = deque(maxlen=KEPT_STEPS)
        self._hosts: deque[float] = deque(maxlen=KEPT_STEPS)

    def add(self, step_seconds: float, host_seconds: float) -> None:
        """A step, and how long this host worked on it before it was dispatched."""
        self._steps.append(step_seconds)
        self._hosts.append(host_seconds)

    def compared(self) -> dict[str, Any]:
        """The record of all processes' times, in milliseconds, and of the slow ones. All processes must call it."""
        if jax.process_count() == 1:
            return {}
        own = [statistics.median(self._steps), statistics.median(self._hosts), device_seconds()]
        step_p, host_p, device_p = multihost_utils.process_allgather(np.asarray(own)).T.tolist()
        found = slow({"its host": host_p, "its slowest device": device_p}, max(step_p))
        for process, reason in found.items():
            self._log(f"process {process} is slow: {reason}")
        times = {"host_ms": host_p, "device_ms": device_p}
        return {key: [1e3 * s for s in seconds_p] for key, seconds_p in times.items()} | {"slow_processes": list(found)}


def device_seconds() -> float:
    """The seconds that the slowest of this process's devices takes for a product; the shortest of several tries."""
    return max(min(_timed(device) for _ in range(TRIES)) for device in jax.local_devices())


def _timed(device: Any) -> float:
    x = jax.block_until_ready(jax.device_put(np.full((SIZE, SIZE), 1 / SIZE, np.float32), device))
    jax.block_until_ready(_product()(x))  # compiled, and behind whatever the device still had to do
    start = time.perf_counter()
    jax.block_until_ready(_product()(x))
    return time.perf_counter() - start


@cache
def _product() -> Callable[[jax.Array], jax.Array]:
    def product(x: jax.Array) -> jax.Array:
        y = x
        for _ in range(TIMES):
            y = jnp.matmul(y, x, precision="highest")
        return y

    return jax.jit(product)
