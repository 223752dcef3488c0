"""The parameters of each part of a model, read from its abstract modules, which alone state their shapes.

Nothing is allocated, and one layer of each kind is traced, however many the model has.
"""

import copy
import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.model.lm import build


class Weight(NamedTuple):
    """A parameter: shape, the logical axis of each dimension, and whether it is float32 in any compute dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    float32: bool = False


class Weights(NamedTuple):
    """The parameters of one layer, its norm included, by letter; of the model's other parts (`embedding`, `norm`, and
    `head` if it is not tied) by name; and of the multi-token-prediction block without its layers."""

    layers: dict[str, tuple[Weight, ...]]
    parts: dict[str, tuple[Weight, ...]]
    mtp: tuple[Weight, ...]


@functools.lru_cache(maxsize=256)
def weights(model: ModelConfig, vocab_rows: int | None = None) -> Weights:
    """The parameters of `model`. vocab_rows: rows of the vocabulary with a plan's padding; None: not padded."""
    letters = "".join(dict.fromkeys(model.layers.main + model.layers.mtp))
    once = changed(model, pattern=letters + ("/" + letters[0] if model.layers.mtp else ""))
    parts: dict[str, Any] = dict(build(once, vocab_rows=vocab_rows).params)
    layers = parts.pop("backbone")["children"]
    block = {name: part for name, part in parts.pop("mtp", {}).items() if name != "layers"}
    return Weights(
        {letter: _weights(layers[index]) for index, letter in enumerate(letters)},
        {name: _weights(part) for name, part in parts.items()},
        _weights(block),
    )


def changed(model: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with other values, which are not checked: its parameters can be counted even if it cannot run."""
    found = copy.copy(model)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


def _weights(tree: Any) -> tuple[Weight, ...]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return tuple(Weight(v.get_value().shape, v.get_metadata()["axes"], v.get_metadata()["float32"]) for v in leaves)
