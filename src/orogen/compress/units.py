"""The weights of a checkpoint's tensors as the products that read them: layer, kind and number of the product."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.precision import GROUPS
from orogen.config.products import product_of
from orogen.config.quantize import PLAIN, ROUTED, UNITS
from orogen.convert.names import Path as Leaf
from orogen.convert.names import Table, Tensor
from orogen.model.homes import Home, homes


class Weight(NamedTuple):
    """A tensor that holds weights of products of one kind. calls: the products' numbers."""

    layer: int
    kind: str
    calls: frozenset[int]

    @property
    def unit(self) -> str:
        """The name of the weights whose format is chosen together."""
        return ROUTED if self.kind in GROUPS[ROUTED] else self.kind


def weights_of(table: Table, config: ModelConfig) -> dict[str, Weight]:
    """The tensors of the layers of the pattern that products read, by name; those of the multi-token-prediction block
    and all others are left out."""
    inside = {(home.path, home.index): (number, home) for number, home in enumerate(homes(config))}
    lengths = sorted({len(path) for path, _ in inside})
    main, found = len(config.layers.main), {}
    for name, tensor in table.items():
        places = [_place(piece.path, piece.index, inside, lengths) for piece in tensor.pieces]
        if not places or None in places:
            continue
        (layer, kind), *others = {place[:2] for place in places if place is not None}
        assert not others, "a tensor's pieces are of one kind"
        if layer < main:
            found[name] = Weight(layer, kind, frozenset(place[2] for place in places if place is not None))
    return found


def _place(
    path: Leaf,
    index: tuple[int, ...],
    inside: Mapping[tuple[Leaf, tuple[int, ...]], tuple[int, Home]],
    lengths: Sequence[int],
) -> tuple[int, str, int] | None:
    """Layer, kind and product of a parameter's part, None if no such product reads it."""
    for length in lengths:
        for depth in range(len(index) + 1):
            if (found := inside.get((path[:length], index[:depth]))) is None:
                continue
            number, home = found
            if (product := product_of(home.letter, path[length:])) is not None:
                return number, *product
    return None


def sizes_of(table: Table, weights: Mapping[str, Weight]) -> dict[tuple[int, str], int]:
    """The number of weights of each unit, by layer and name."""
    found: dict[tuple[int, str], int] = {}
    for name, weight in weights.items():
        key = weight.layer, weight.unit
        found[key] = found.get(key, 0) + _size(table[name])
    return found


def _size(tensor: Tensor) -> int:
    size = 1
    for length in tensor.shape:
        size *= length
    return size


def by_unit(choices: Sequence[Mapping[str, tuple[str, ...]]]) -> dict[tuple[int, str], tuple[str, ...]]:
    """The formats that each unit may have, from those of its kinds, which are equal where there are several."""
    found = {}
    for layer, kinds in enumerate(choices):
        for unit, members in UNITS.items():
            present = [kinds[kind] for kind in members if kind in kinds]
            if present:
                found[layer, unit] = present[0]
    return found


def kinds_with(formats: Mapping[tuple[int, str], str], choices: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """The format of each kind of each layer, from those of the units."""
    named = {kind: unit for unit, members in UNITS.items() for kind in members}
    return [{kind: formats.get((n, named[kind]), PLAIN) for kind in kinds} for n, kinds in enumerate(choices)]
