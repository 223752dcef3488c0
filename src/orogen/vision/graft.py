"""A language model with layers inserted that see images: it computes what it did, until they are trained."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from orogen.checkpoint.leaves import leaves_of
from orogen.compress.rewrite import Arrays, Source, homes
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.convert.config import difference
from orogen.convert.names import Path as Leaf
from orogen.model.lm import initial_state
from orogen.model.stages import RESAMPLER

INSERTED = "xg"


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
    added = ("image_feature_size", "image_features", "resampler_latents", "resampler_layers", "intermediate_size",
             "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
    return (name for name in added if getattr(old, name) is None)


def _with(config: ModelConfig, fields: dict[str, Any]) -> ModelConfig:
    return dataclasses.replace(config, **fields)


class Grafted:
    """Makes the new model's parameters: the old one's, and fresh ones for what is new; see `rewrite`."""

    def __init__(self, source: Source, config: ModelConfig, seed: int):
        self._source, self._homes = source, homes(config)
        params, buffers = jax.jit(initial_state, static_argnums=0)(config, seed)
        self._fresh = {path: np.asarray(leaf.get_value()) for path, leaf in leaves_of(params, buffers).items()}
        old = iter(range(len(source.homes)))
        self._old = [None if home.letter in INSERTED else next(old) for home in self._homes]

    def layer(self, number: int) -> Arrays:
        """The layer's parameters: the old model's, or fresh ones."""
        known, home = self._old[number], self._homes[number]
        if known is not None:
            return self._source.layer(known).arrays()
        size = len(home.path)
        return {path[size:]: array[home.index] for path, array in self._fresh.items() if path[:size] == home.path}

    def rest(self, path: Leaf) -> np.ndarray:
        """A parameter outside the layers."""
        return self._fresh[path] if path[0] == RESAMPLER else self._source.read(path)
