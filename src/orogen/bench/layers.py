"""What the benchmarks of decoding share: several layers in a row, so that none finds its operands in the cache.

An operation of decoding takes microseconds, less than a program's start, and its operands would stay in the GPU's cache
if one layer were timed over and over. So a program runs it for several layers, each with operands of its own, as a
model does; times and bytes are those of all layers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from orogen.bench.operation import largest_errors
from orogen.bench.timing import Program


def draws(seed: int) -> Callable[..., Array]:
    """A function that draws an array of a shape from the normal distribution, float32, another one in each call."""

    def keys() -> Iterator[Array]:
        key = jax.random.key(seed)
        while True:
            key, mine = jax.random.split(key)
            yield mine

    source = keys()
    return lambda *shape: jax.random.normal(next(source), shape, jnp.float32)


def carried(function: Callable[..., tuple[Any, Any]], state: Any, *arguments: Any) -> Program:
    """`function(state, *arguments)`, which returns results and the new state; every call overwrites the last one's.

    The first call starts from `state`, which stays as it is.
    """
    program = jax.jit(function, donate_argnums=0).lower(state, *arguments).compile()
    planned = program.memory_analysis()
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    held = [copy(state)]

    def start() -> Any:
        results, held[0] = program(held[0], *arguments)
        return results, held[0]

    temporary = None if planned is None else round(planned.temp_size_in_bytes / 2**20)
    # A copy, since the next call overwrites what this one returns.
    return Program(start, jax.block_until_ready, copy, temporary)


def errors_of_layers(
    work: str, names: Sequence[str], exact: Callable[..., Any], layers: Iterable[Any], results: tuple[Any, ...]
) -> dict[str, float]:
    """The largest error of a layer, by `work_name` of every result; results: for each name a tuple of all layers'.

    exact: the results of a layer from its operands, which it gets in float32.
    """

    def parts() -> Iterator[tuple[Sequence[Any], Sequence[Any]]]:
        for number, operands in enumerate(layers):
            yield [result[number] for result in results], jax.tree.leaves(exact(*jax.tree.map(_single, operands)))

    return largest_errors([f"{work}_{name}" for name in names], parts())


def _single(array: Array) -> Array:
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
