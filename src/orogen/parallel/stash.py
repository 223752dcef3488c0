"""The storage of a pipeline's residuals between a forward pass and its backward pass: flat buffers with a row per slot.

A forward pass copies residuals into a row, and its backward pass copies them out. The alternative, one program per slot
with arrays of its own, copies nothing, yet it was slower on GPUs, and every device held the slots of all stages
(experiments/two_gpus).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.varying import vary, varying_axes

# Bound on the elements of one slot of a buffer: offsets are int32.
MOST_ELEMENTS = 2**31


class Kept(NamedTuple):
    """Where a residual lies in a row: its buffer, its first element and its shape."""

    buffer: int
    start: int
    shape: tuple[int, ...]


class Stash:
    """Flat buffers (slots, n), one for each dtype and set of mesh axes that residuals vary over. A buffer is as long as
    the program that stores the most in it requires; where an int32 could no longer count its elements, another one
    begins."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, tuple[str, ...]]] = []
        self._lengths: list[int] = []

    def add(self, avals: Sequence[Any]) -> tuple[Kept, ...]:
        """Reserves space for the residuals of one more program, and returns the place of each."""
        used: dict[int, int] = {}
        kept = []
        for aval in avals:
            kind, size = (aval.dtype, tuple(sorted(aval.mat.varying))), math.prod(aval.shape)
            fits = lambda b, size=size: used.get(b, 0) + size < MOST_ELEMENTS  # noqa: E731
            buffer = next((b for b, k in enumerate(self._kinds) if k == kind and fits(b)), len(self._kinds))
            if buffer == len(self._kinds):
                self._kinds.append(kind)
                self._lengths.append(0)
            kept.append(Kept(buffer, used.get(buffer, 0), aval.shape))
            used[buffer] = used.get(buffer, 0) + size
        for buffer, length in used.items():
            self._lengths[buffer] = max(self._lengths[buffer], length)
        return tuple(kept)

    def empty(self, slots: int) -> tuple[Array, ...]:
        """The buffers before the first tick."""
        pairs = zip(self._kinds, self._lengths, strict=True)
        return tuple(vary(jnp.zeros((slots, length), dtype), axes) for (dtype, axes), length in pairs)


def put(buffers: Sequence[Array], place: Sequence[Kept], slot: Array, values: Sequence[Array]) -> tuple[Array, ...]:
    """The buffers with the residuals of a forward pass in a slot. place: where a program's residuals lie."""
    found = list(buffers)
    for kept, value in zip(place, values, strict=True):
        buffer = found[kept.buffer]
        flat = vary(value.reshape(1, -1), varying_axes(buffer))
        found[kept.buffer] = lax.dynamic_update_slice(buffer, flat, (slot, jnp.full_like(slot, kept.start)))
    return tuple(found)


def get(buffers: Sequence[Array], place: Sequence[Kept], slot: Array) -> list[Array]:
    """The residuals in a slot."""
    found = []
    for kept in place:
        start = slot, jnp.full_like(slot, kept.start)
        flat = lax.dynamic_slice(buffers[kept.buffer], start, (1, math.prod(kept.shape)))
        found.append(flat.reshape(kept.shape))
    return found
