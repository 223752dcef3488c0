"""Times programs in turn, and measures the device's ceilings."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CALLS = 10  # per sample; only the last is waited for, so that the host's own time overlaps with the device's
# Sizes for the ceilings: side of a square bfloat16 matrix, and elements to copy. Off a GPU the large ones take minutes.
ON_GPU, ELSEWHERE = {"matrix": 8192, "copied": 2**30}, {"matrix": 1024, "copied": 2**22}


class Program(NamedTuple):
    """Something to time: `start` begins its work and returns its result, `wait` returns once a result is computed, and
    `read` returns a result as jax arrays.

    temporary_mb: MiB that it needs besides arguments and results; None if unknown.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], Any]
    read: Callable[[Any], Any]
    temporary_mb: int | None


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """`function` of `arguments`, compiled for the first device."""
    program = jax.jit(function).lower(*arguments).compile()
    planned = program.memory_analysis()
    temporary = None if planned is None else round(planned.temp_size_in_bytes / 2**20)
    return Program(lambda: program(*arguments), jax.block_until_ready, lambda result: result, temporary)


def time_in_turn(programs: Mapping[Any, Program], *, samples: int, calls: int = CALLS) -> dict[Any, list[float]]:
    """Milliseconds per call of each program, by key: one sample per round, and in each round every program runs in
    turn."""
    times: dict[Any, list[float]] = {key: [] for key in programs}
    for program in programs.values():
        program.wait(program.start())
    for _ in range(samples):
        for key, program in programs.items():
            started = time.perf_counter()
            for _ in range(calls - 1):
                program.start()
            program.wait(program.start())
            times[key].append((time.perf_counter() - started) / calls * 1e3)
    return times


def summary(milliseconds: Sequence[float]) -> dict[str, float]:
    """The median, the best and the worst of the samples."""
    named = {"ms": statistics.median(milliseconds), "best_ms": min(milliseconds), "worst_ms": max(milliseconds)}
    return {name: round(value, 4) for name, value in named.items()}


def ceilings(*, samples: int, sizes: Mapping[str, int] | None = None) -> dict[str, float]:
    """TFLOP/s of a product of two square bfloat16 matrices, and TB/s that a copy reads and writes.

    sizes: by default ON_GPU on a GPU and ELSEWHERE on others. Operands are random: a product of zeros is faster (by an
    eighth on an H200).
    """
    sizes = sizes or (ON_GPU if jax.default_backend() == "gpu" else ELSEWHERE)
    matrix, copied = sizes["matrix"], sizes["copied"]
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)  # noqa: E731
    left, right, array = draw(0, (matrix, matrix)), draw(1, (matrix, matrix)), draw(2, (copied,))
    programs = {"product": compiled(jnp.matmul, left, right), "copy": compiled(jnp.negative, array)}
    times = {name: statistics.median(taken) for name, taken in time_in_turn(programs, samples=samples).items()}
    return {
        "matmul_tflops": round(2 * matrix**3 / times["product"] / 1e9, 1),
        "copy_tb_per_second": float(f"{2 * array.nbytes / times['copy'] / 1e9:.4g}"),
    }
