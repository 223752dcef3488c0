"""Where each layer's parameters are in a model's tree of parameters."""

import itertools
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.model.block import places, repeats


class Home(NamedTuple):
    """Where a layer's parameters are: the path of its module in the tree, and the layer's index in the leading axes
    that repetition adds to the module's arrays."""

    letter: str
    path: tuple[str | int, ...]
    index: tuple[int, ...]


def homes(config: ModelConfig) -> list[Home]:
    """The home of each layer in pattern order, those of the multi-token-prediction block last."""
    found = []
    for stem, pattern in ((("backbone",), config.layers.main), (("mtp", "layers"), config.layers.mtp)):
        for letter, place in zip(pattern, places(repeats(pattern)), strict=True):
            path = itertools.chain.from_iterable(("children", child) for child in place.path)
            found.append(Home(letter, (*stem, *path), place.index))
    return found
