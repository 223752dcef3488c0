"""Where the parameters of each layer are in the tree of a model's."""

import itertools
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.model.block import places, repeats


class Home(NamedTuple):
    """Where a layer's parameters are: the path of its module, and its index in their leading axes."""

    letter: str
    path: tuple[str | int, ...]
    index: tuple[int, ...]


def homes(config: ModelConfig) -> list[Home]:
    """The home of each layer, counted along the pattern, those of the multi-token-prediction block last."""
    found = []
    for stem, pattern in ((("backbone",), config.layers.main), (("mtp", "layers"), config.layers.mtp)):
        for letter, place in zip(pattern, places(repeats(pattern)), strict=True):
            path = itertools.chain.from_iterable(("children", child) for child in place.path)
            found.append(Home(letter, (*stem, *path), place.index))
    return found
