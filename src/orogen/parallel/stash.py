"""Where a pipeline's residuals wait between a forward pass and its backward pass.

`Copied` has flat buffers with a row per slot: all slots share a program, whose residuals are copied into a row and out
of it. `InPlace` has arrays for each slot, and each slot has a program of its own, which knows its arrays: XLA then lets
the forward pass write where the backward pass reads. That takes as many programs as there are slots in use.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.parallel.schedule import BACKWARD, FORWARD, Schedule, Tables
from orogen.parallel.varying import vary, varying_axes

# Bound on the elements of one slot of a buffer: offsets are int32.
MOST_ELEMENTS = 2**31
COPIED, IN_PLACE = "copied", "in_place"


class Variant(NamedTuple):
    """What a branch is compiled for: a program, and a slot of the stash; None: for any slot."""

    program: int
    slot: int | None


def variants(tables: Tables, program_vp: np.ndarray, count: int, *, kind: str) -> list[Variant]:
    """The variants of a schedule. program_vp: which of `count` programs chunk v of stage p runs."""
    if kind == COPIED:
        return [Variant(program, None) for program in range(count)]
    used = {
        Variant(int(program_vp[tables.chunk[t, s], s]), int(tables.stash[t, s]))
        for t, s in np.argwhere(tables.operation == FORWARD)
    }
    return sorted(used)


def branches_ts(tables: Tables, program_vp: np.ndarray, found: Sequence[Variant]) -> np.ndarray:
    """(ticks, stages) int: the branch of the loop that a stage takes. 0 idles, the next are the forward passes of the
    variants `found`, the last their backward passes."""
    program_ts = program_vp[tables.chunk, np.arange(tables.chunk.shape[1])]
    branch_ts = np.zeros_like(program_ts)
    for index, (program, slot) in enumerate(found):
        here_ts = (program_ts == program) & ((tables.stash == slot) if slot is not None else True)
        for operation, first in ((FORWARD, 1), (BACKWARD, 1 + len(found))):
            branch_ts[here_ts & (tables.operation == operation)] = first + index
    return branch_ts


class Kept(NamedTuple):
    """Where a residual lies in a row: its buffer, its first element and its shape."""

    buffer: int
    start: int
    shape: tuple[int, ...]


class Copied:
    """Flat buffers (slots, n), one for each dtype and set of mesh axes that residuals vary over, as long as the program
    that stores the most there needs. If an int32 could no longer count a buffer's elements, another one begins."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, tuple[str, ...]]] = []
        self._lengths: list[int] = []
        self._kept: list[tuple[Kept, ...]] = []

    def add(self, avals: Sequence[Any]) -> tuple[Kept, ...]:
        """Makes room for the residuals of the next program."""
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
        self._kept.append(tuple(kept))
        return self._kept[-1]

    def empty(self, schedule: Schedule, found: Sequence[Variant]) -> Any:
        """The stash before the first tick."""
        slots = max(schedule.stash_slots)
        pairs = zip(self._kinds, self._lengths, strict=True)
        return tuple(vary(jnp.zeros((slots, length), dtype), axes) for (dtype, axes), length in pairs)

    def put(self, stash: Any, variant: Variant, slot: Array, values: Sequence[Array]) -> Any:
        """The stash with the residuals of a forward pass in a slot."""
        stash = list(stash)
        for kept, value in zip(self._kept[variant.program], values, strict=True):
            buffer = stash[kept.buffer]
            flat = vary(value.reshape(1, -1), varying_axes(buffer))
            stash[kept.buffer] = lax.dynamic_update_slice(buffer, flat, (slot, jnp.full_like(slot, kept.start)))
        return tuple(stash)

    def get(self, stash: Any, variant: Variant, slot: Array) -> list[Array]:
        """The residuals in a slot."""
        found = []
        for kept in self._kept[variant.program]:
            start = slot, jnp.full_like(slot, kept.start)
            flat = lax.dynamic_slice(stash[kept.buffer], start, (1, math.prod(kept.shape)))
            found.append(flat.reshape(kept.shape))
        return found


class InPlace:
    """Arrays of their own for each variant, which differ in number and shape between programs."""

    def __init__(self) -> None:
        self._avals: list[tuple[Any, ...]] = []

    def add(self, avals: Sequence[Any]) -> None:
        """As of `Copied`."""
        self._avals.append(tuple(avals))

    def empty(self, schedule: Schedule, found: Sequence[Variant]) -> Any:
        """As of `Copied`."""
        zeros = lambda aval: vary(jnp.zeros(aval.shape, aval.dtype), tuple(sorted(aval.mat.varying)))  # noqa: E731
        return {variant: tuple(zeros(aval) for aval in self._avals[variant.program]) for variant in found}

    def put(self, stash: Any, variant: Variant, slot: Array, values: Sequence[Array]) -> Any:
        """As of `Copied`."""
        return {**stash, variant: tuple(jnp.asarray(value, value.dtype) for value in values)}

    def get(self, stash: Any, variant: Variant, slot: Array) -> list[Array]:
        """As of `Copied`."""
        return list(stash[variant])


STASHES = {COPIED: Copied, IN_PLACE: InPlace}
