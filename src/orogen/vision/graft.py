"""A language model with layers inserted that see images: it computes what it did, until they are trained."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from orogen.checkpoint.leaves import leaves_of
from orogen.compress.rewrite import Arrays, Source
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.convert.config import difference
from orogen.convert.names import Path as Leaf
from orogen.model.homes import Home, homes
from orogen.model.lm import initial_state
from orogen.model.stages import RESAMPLER

INSERTED = "xg"
OUTWARD = ("out", "down")  # projections back into the residual stream


def check_graft(old: ModelConfig, new: ModelConfig) -> None:
    """Raises ConfigError unless the new model is the old one with gated layers inserted."""
    bare = new.pattern.translate(str.maketrans("", "", INSERTED + "|"))
    if set(old.pattern) & set(INSERTED):
        raise ConfigError(f"the checkpoint's pattern is {old.pattern!r}; expected none of {INSERTED} in it yet")
    if bare != old.pattern.replace("|", "") or "x" not in new.layers.main:
        raise ConfigError(
            f"ModelConfig.pattern is {new.pattern!r}; expected {old.pattern!r} with x, and g if wanted, inserted"
        )
    mine = {name: getattr(new, name) for name in ("pattern", *_seeing(old))}
    field = difference(_with(old, mine), new)
    if field is not None:
        here, there = getattr(new, field), getattr(old, field)
        raise ConfigError(f"ModelConfig.{field} is {here!r}; expected {there!r}, as the checkpoint has it")


def _seeing(old: ModelConfig) -> Iterator[str]:
    """The fields that the new layers add, unless the old model has them."""
    added = (
        "image_feature_size", "image_features", "resampler_latents", "resampler_layers", "retrieved_captions",
        "caption_tokens", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    )  # fmt: skip
    return (name for name in added if getattr(old, name) is None)


def _with(config: ModelConfig, fields: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(config, **fields)


class Grafted:
    """Makes the new model's parameters: the old one's, and fresh ones for what is new; see `rewrite`."""

    def __init__(self, source: Source, config: ModelConfig, seed: int):
        self._source, letters = source, [home.letter for home in homes(config)]
        inserted = "".join(letter for letter in letters if letter in INSERTED)
        # Of the new layers alone: the old model may not fit into memory.
        tokens = 1 if config.caption_tokens is None else config.vocab_size  # an encoder of captions has a table of them
        alone = dataclasses.replace(config, pattern=inserted, vocab_size=tokens, learned_positions=None, mtp_depths=0)
        params, buffers = jax.jit(initial_state, static_argnums=0)(alone, seed)
        self._shrink = np.float32(config.output_init_std / alone.output_init_std)
        self._fresh = {path: np.asarray(leaf.get_value()) for path, leaf in leaves_of(params, buffers).items()}
        old, new = iter(range(len(source.homes))), iter(homes(alone))
        self._places: list[int | Home] = [next(new) if letter in INSERTED else next(old) for letter in letters]

    def layer(self, number: int) -> Arrays:
        """The layer's parameters: the old model's, or fresh ones."""
        place = self._places[number]
        if isinstance(place, int):
            return self._source.layer(place).arrays()
        size = len(place.path)
        made = {path[size:]: array[place.index] for path, array in self._fresh.items() if path[:size] == place.path}
        return {name: self._scaled(name, array) for name, array in made.items()}

    def rest(self, path: Leaf) -> np.ndarray:
        """A parameter outside the layers."""
        return self._scaled(path, self._fresh[path]) if path[0] == RESAMPLER else self._source.read(path)

    def _scaled(self, path: Leaf, array: np.ndarray) -> np.ndarray:
        """A fresh parameter with the deviation that it has in the whole model, which has more layers."""
        return array * self._shrink if path[-1] in OUTWARD else array
