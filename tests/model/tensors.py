"""Tensors under Hugging Face's names, all in memory, as parameters of modules. Gradients map as weights do."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.convert.names import Path, Table, leaf_shapes, table

Tensors = Mapping[str, np.ndarray]


def gather(tensors: Table, values: Tensors) -> dict[Path, np.ndarray]:
    """Every parameter by path, of the tensors that there are."""
    tensors = {name: tensor for name, tensor in tensors.items() if name in values}
    shapes = leaf_shapes(tensors)
    found: dict[Path, np.ndarray] = {}
    for name, tensor in tensors.items():
        for piece in tensor.pieces:
            if piece.path not in found:
                found[piece.path] = np.empty(shapes[piece.path], values[name].dtype)
            found[piece.path][piece.index] = piece.take(values[name])
    return found


def values(tensors: Tensors, config: ModelConfig, family: str = "nemotron_h") -> dict[Path, np.ndarray]:
    """Every parameter and buffer of a LanguageModel of `config` that `tensors` holds, by path."""
    return gather(table(family, config), tensors)


def mtp_values(tensors: Tensors, config: ModelConfig, depth: int) -> dict[Path, np.ndarray]:
    """Those of the MTPBlock that a checkpoint with one block a depth applies at `depth`, counted from 0."""
    size = len(config.layers.mtp)
    block = {}
    for number in range(size):
        here, there = f"mtp.layers.{number}.", f"mtp.layers.{depth * size + number}."
        block |= {here + name.removeprefix(there): t for name, t in tensors.items() if name.startswith(there)}
    return {path[1:]: value for path, value in values(block, config).items()}


def layer_values(tensors: Tensors, config: ModelConfig, letter: str, prefix: str) -> dict[Path, np.ndarray]:
    """Those of one Layer, whose tensors' names begin with `prefix`."""
    alone = dataclasses.replace(config, pattern=letter, mtp_depths=0)
    start = "backbone.layers.0"
    found = {start + name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
    return {path[3:]: value for path, value in values(found, alone).items()}


def fill(state: nnx.State, found: Mapping[Path, np.ndarray]) -> nnx.State:
    """`state` with the values found. Raises ValueError if one is missing or has another shape."""
    filled = []
    for path, variable in nnx.to_flat_state(state):
        expected = variable.get_value().shape
        if path not in found or found[path].shape != expected:
            raise ValueError(f"{path} is {found[path].shape if path in found else 'missing'}; expected {expected}")
        filled.append((path, variable.replace(jnp.asarray(found[path]))))
    return nnx.from_flat_state(filled)


def module(build: Callable[[], nnx.Module], found: Mapping[Path, np.ndarray]) -> nnx.Module:
    """The module that `build` makes, with the values found in it, its own never drawn."""
    graph, state = nnx.split(jax.eval_shape(build))
    return nnx.merge(graph, fill(state, found))
