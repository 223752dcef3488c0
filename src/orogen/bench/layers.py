"""Shared by the benchmarks of decoding, which time several layers in a row so that no operand is found in the cache.

An operation of decoding takes microseconds, less than launching a program, and if one layer were timed repeatedly its
operands would stay in the GPU's cache. So each program runs the operation for several layers with different operands,
as a model does; times and bytes are totals over these layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.bench.operation import largest_errors
from orogen.bench.timing import Program


def draws(seed: int) -> Callable[..., Array]:
    """A function that draws a float32 array of the given shape from the normal distribution, a new one in each call."""

    def keys() -> Iterator[Array]:
        key = jax.random.key(seed)
        while True:
            key, mine = jax.random.split(key)
            yield mine

    source = keys()
    return lambda *shape: jax.random.normal(next(source), shape, jnp.float32)


def carried(function: Callable[..., tuple[Any, Any]], state: Any, *arguments: Any) -> Program:
    """A Program of `function(state, *arguments)`, which returns results and the new state.

    Each call starts from the state that the previous one returned, and overwrites it. The first call starts from a copy
    of `state`.
    """
    program = jax.jit(function, donate_argnums=0).lower(state, *arguments).compile()
    planned = program.memory_analysis()
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    held = [copy(state)]

    def start() -> Any:
        results, held[0] = program(held[0], *arguments)
        return results, held[0]

    temporary = None if planned is None else round(planned.temp_size_in_bytes / 2**20)
    # `read` copies, since the next call overwrites what this one returns.
    return Program(start, jax.block_until_ready, copy, temporary)


def errors_of_layers(
    work: str, names: Sequence[str], exact: Callable[..., Any], layers: Iterable[Any], results: tuple[Any, ...]
) -> dict[str, float]:
    """The largest error over layers of each named result, with `{work}_{name}` as its key.

    exact: computes the reference results of a layer from its operands, which are cast to float32 first. layers: the
    operands of each layer. results: one tuple per name, with the result of each layer.
    """

    def parts() -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        for number, operands in enumerate(layers):
            yield [result[number] for result in results], jax.tree.leaves(exact(*jax.tree.map(_single, operands)))

    return largest_errors([f"{work}_{name}" for name in names], parts())


def _single(array: Array) -> Array:
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
