"""The scales of keys and values in FP8 that a Hugging Face checkpoint holds, by layer.

ModelOpt has `k_proj.k_scale` and `v_proj.v_scale` below the module of an attention layer, compressed-tensors `k_scale`
and `v_scale`; both are numbers. Latent attention has one scale for all that it keeps, under both names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from orogen.config.model import ModelConfig
from orogen.config.quantize import ATTENTION
from orogen.config.recipe import Scales
from orogen.convert.names import Table
from orogen.convert.parts import module_of
from orogen.model.homes import homes

# Below the module of the layer, keys' and values', by layout of the files.
NAMES = {
    "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
    "compressed-tensors": ("k_scale", "v_scale"),
}


def attention_modules(table: Table, config: ModelConfig) -> dict[int, str]:
    """The name of the module of each attention layer of the pattern, by the layer's number."""
    places = {
        (*home.path, home.index): number
        for number, home in enumerate(homes(config)[: len(config.layers.main)])
        if home.letter in ATTENTION
    }
    found: dict[int, str] = {}
    for name, tensor in table.items():
        for piece in tensor.pieces:
            *above, mixer, leaf = piece.path
            number = places.get((*above, piece.index[: _depth(above)]))
            if mixer == "mixer" and leaf == "out" and number is not None:
                found[number] = module_of(name).rpartition(".")[0]
    return found


def _depth(path: list[str | int]) -> int:
    """The number of repetitions around a layer at this path: every level of children but the last is one."""
    return max(path.count("children") - 1, 0)


def scales_of(
    table: Table, config: ModelConfig, have: Mapping[str, Any], read: Callable[[str], np.ndarray]
) -> tuple[Scales | str | None, ...]:
    """The scales of each layer of the pattern: a pair of numbers; None for a layer without scales; or a line that says
    what is wrong, if they are not two finite numbers above 0. It is not an error unless the scales are used. have: the
    names of all tensors."""
    modules = attention_modules(table, config)

    def of_layer(number: int) -> Scales | str | None:
        for names in NAMES.values():
            pair = [f"{modules[number]}.{name}" for name in names] if number in modules else [""]
            if all(name in have for name in pair):
                found = [np.asarray(read(name), np.float32) for name in pair]
                for name, a in zip(pair, found, strict=True):
                    if a.size != 1:
                        return f"{name} has the shape {a.shape}; expected one number"
                    if not 0 < a.item() < np.inf:
                        return f"{name} is {a.item()}; expected a finite number above 0"
                return found[0].item(), found[1].item()
        return None

    return tuple(of_layer(number) for number in range(len(config.layers.main)))
