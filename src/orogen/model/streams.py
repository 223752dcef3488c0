"""The residual stream after chosen layers of a stack.

Layers are numbered along the pattern from 0. A repetition that contains a chosen layer keeps the streams of all its
iterations, since a scan has one program: d numbers per token and iteration.
"""

from collections.abc import Collection, Sequence
from typing import Any

from jax import Array

from orogen.layers.probe import Probe, Seen
from orogen.model.block import Items, places, repeats
from orogen.model.cache import map_layers


def watching(pattern: str, layers: Collection[int]) -> Any:
    """The probes that a stack of the pattern is given so that these layers keep the residual stream after them; None if
    there are no such layers."""
    if not layers:
        return None
    found = places(repeats(pattern))
    return _given(repeats(pattern), {found[number].path for number in layers}, ())


def _given(items: Items, wanted: Collection[tuple[int, ...]], path: tuple[int, ...]) -> tuple[Any, ...]:
    given = []
    for number, item in enumerate(items):
        here = (*path, number)
        if isinstance(item, str):
            given.append(Probe(streams=True) if here in wanted else None)
        else:
            given.append(_given(item.items, wanted, here))
    return tuple(given)


def streams(pattern: str, kept: Any, layers: Sequence[int]) -> list[Array]:
    """The residual streams (b, t, d) after these layers, from what a stack that was `watching` them kept."""
    found, every = [], places(repeats(pattern))
    for number in layers:
        seen = kept
        for child in every[number].path:
            seen = seen[child]
        found.append(seen.after_btd[every[number].index])
    return found


def unwatched(kept: Any) -> Any:
    """`kept` as it would be without `watching`."""
    return map_layers(lambda one: one.kept if isinstance(one, Seen) else one, kept)
