"""A quantised checkpoint from one that is not: the encoding of each tensor, and the scales of inputs.

Where tensors are and how files describe them is `checkpoint/quantised.py`'s: as NVIDIA/Model-Optimizer stores them, or,
for FP8 without rounded inputs, which it does not have, as compressed-tensors does.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from orogen.checkpoint.cache_scales import NAMES, attention_modules
from orogen.checkpoint.folders import HuggingFaceFolder
from orogen.checkpoint.quantised import linear_modules, parts_by_name, write_quantised
from orogen.compress.units import Weight, weights_of
from orogen.config.checks import ConfigError
from orogen.config.precision import GROUPS, KINDS
from orogen.config.quantize import BITS, PLAIN, ROUTED, Target
from orogen.config.recipe import Scales
from orogen.config.rounded import Operand
from orogen.convert.describe import Description, describe
from orogen.convert.parts import Parts, module_of
from orogen.precision import rounding
from orogen.precision.stored import E4M3, Stored, decode, encode, float32_scale, largest_magnitudes, nvfp4_bound

# The formats as they are stored.
STORED = {"fp8": "fp8_tensor", "fp8_channel": "fp8_channel", "nvfp4": "nvfp4"}
FP8_LARGEST = 448.0


class Entry(NamedTuple):
    """One tensor that becomes quantised. group: the tensors that share a float32 scale."""

    weight: Weight
    target: Target
    group: tuple[Any, ...]


class Error(NamedTuple):
    """Of weights after rounding: the sum of squared errors, that of squares, bytes before and after."""

    errors: float = 0.0
    squares: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0

    def plus(self, other: "Error") -> "Error":
        """Both together."""
        return Error(
            self.errors + other.errors,
            self.squares + other.squares,
            self.bytes_before + other.bytes_before,
            self.bytes_after + other.bytes_after,
        )


def entries_of(folder: HuggingFaceFolder, targets: Sequence[Mapping[str, Target]]) -> dict[str, Entry]:
    """The tensors that become quantised, by name. targets: by layer and kind; others stay. Raises ConfigError for a
    folder that is quantised already."""
    tensors = folder.tensors
    if tensors.quantization:
        raise ConfigError(f"{str(folder.folder)!r} is quantised; expected a checkpoint that is not")
    found = {}
    for name, weight in weights_of(tensors.table, folder.config).items():
        target = targets[weight.layer].get(weight.kind)
        if target is not None and target.format != PLAIN:
            alone = weight.kind in GROUPS[ROUTED]
            group = (name,) if alone else (weight.layer, weight.kind, min(weight.calls))
            found[name] = Entry(weight, target, group)
    return found


def write_entries(
    folder: HuggingFaceFolder,
    entries: Mapping[str, Entry],
    target: Path,
    *,
    maxima: np.ndarray | None,
    cache: Sequence[Scales | None] = (),
) -> dict[tuple[int, str], Error]:
    """Writes the Orogen folder `target`; returns the error of each unit's weights, by layer and name.

    maxima: (layers, kinds, calls) of calibration, for static scales of inputs. cache: by layer, the scales of keys and
    values in FP8; none: they stay. Raises ConfigError for a weight that is not finite, or that no layout of files
    describes, and then leaves no `target`.
    """
    found, (description, parts) = {}, layout_of(folder, entries, cache=bool(cache))
    groups = _shared_magnitudes(folder, entries, parts)

    def encoding(name: str, array: np.ndarray, parts: Parts) -> Stored:
        entry = entries[name]
        stored = encoded(array, entry.target, groups[entry.group], inverse=parts.scheme.inverse)
        key = entry.weight.layer, entry.weight.unit
        size = folder.tensors.dtype(name).itemsize * array.size
        found[key] = found.get(key, Error()).plus(_error(array, stored, size))
        return stored

    scales = _of_cache(folder, description, cache)
    for name, entry in entries.items():
        if entry.target.inputs and entry.target.format != "fp8_channel":
            names = parts[name].scheme.names
            scales[parts[name].scale.removesuffix(names.scale) + names.inputs[0]] = _input_scale(entry, maxima)
    write_quantised(folder, target, description, encoding, scales=scales)
    return found


def _of_cache(
    folder: HuggingFaceFolder, description: Description, cache: Sequence[Scales | None]
) -> dict[str, np.ndarray]:
    """The tensors with the scales of keys and values."""
    modules, names = attention_modules(folder.tensors.table, folder.config), NAMES[description.config["quant_method"]]
    return {
        f"{modules[number]}.{name}": np.asarray(scale, np.float32)
        for number, pair in enumerate(cache)
        if pair is not None
        for name, scale in zip(names, pair, strict=True)
    }


def layout_of(
    folder: HuggingFaceFolder, entries: Mapping[str, Entry], *, cache: bool = False
) -> tuple[Description, dict[str, Parts]]:
    """What the files say of the formats, and how each of the tensors is stored. cache: whether keys and values are in
    FP8. Raises ConfigError if no layout of files can say it."""
    description = _description_of(folder, entries, cache)
    parts = parts_by_name(folder.tensors.table, description)
    if lacking := sorted(entries.keys() - parts.keys()):
        expected = "a model whose products read linear maps (out, in), or experts"
        raise ConfigError(f"{lacking[0]} is no weight that files describe as quantised; expected {expected}")
    if surplus := sorted(parts.keys() - entries.keys()):
        raise ConfigError(f"{module_of(surplus[0])} has {surplus[0]} in {PLAIN} beside others; expected one format")
    return description, parts


def _description_of(folder: HuggingFaceFolder, entries: Mapping[str, Entry], cache: bool) -> Description:
    kinds: dict[str, str] = {}
    for name, entry in entries.items():
        module, kind = module_of(name), STORED[entry.target.format]
        if kinds.setdefault(module, kind) != kind:
            raise ConfigError(f"{module} has weights in {kinds[module]} and {kind}; expected one format")
    inputs, layout = {}, "modelopt"
    for entry in entries.values():
        name = entry.target.format
        static = "dynamic" if name == "fp8_channel" else "static"
        inputs[STORED[name]] = static if entry.target.inputs else "none"
        if name != "nvfp4" and not entry.target.inputs:
            layout = "compressed-tensors"
    return describe(layout, kinds, linear_modules(folder.tensors.table), inputs=inputs, cache=cache)


def _input_scale(entry: Entry, maxima: np.ndarray | None) -> np.ndarray:
    assert maxima is not None, "static scales come from calibration"
    weight = entry.weight
    largest = maxima[weight.layer, KINDS.index(weight.kind), sorted(weight.calls)].max()
    return float32_scale(largest, nvfp4_bound() if entry.target.format == "nvfp4" else FP8_LARGEST)


def _shared_magnitudes(
    folder: HuggingFaceFolder, entries: Mapping[str, Entry], parts: Mapping[str, Parts]
) -> dict[tuple[Any, ...], np.ndarray]:
    """The largest magnitude of each group's matrices."""
    found: dict[tuple[Any, ...], np.ndarray] = {}
    for name, entry in entries.items():
        array = folder.tensors.tensor(name)
        largest = largest_magnitudes(array.swapaxes(-1, -2) if parts[name].turned else array, "fp8_tensor")
        if not np.isfinite(largest).all():
            raise ConfigError(f"{folder.folder}: {name} has a number that is not finite; expected finite weights")
        found[entry.group] = np.maximum(found.get(entry.group, largest), largest)
    return found


def encoded(array: np.ndarray, target: Target, largest: np.ndarray, *, inverse: bool = False) -> Stored:
    """Matrices (…, out, in) as the target stores them. largest: (…) of all matrices that share the scale. inverse: of
    `Stored`, whether nvfp4's numbers are divided by the global scale."""
    if target.format == "fp8":
        return encode(array, "fp8_tensor", largest=largest)[0]
    if target.format == "fp8_channel":
        return encode(array, "fp8_channel")[0]
    bound = rounding.LARGEST_SCALE_OF_TWO if target.scales == "four_over_six" else rounding.LARGEST_SCALE
    whole = float32_scale(largest, nvfp4_bound(bound), inverse=inverse)
    if target.scales == "max":
        return encode(array, "nvfp4", global_scale=whole, inverse=inverse)[0]
    unit = np.asarray(_block_scales(target.weight, array, largest[..., None, None]), np.float64)
    by = whole.astype(np.float64)[..., None, None]
    scale = (unit * by if inverse else unit / by).astype(np.float32).astype(E4M3)
    # The quotient is within 2^-22 of one of E4M3's numbers, which is the nearest.
    return encode(array, "nvfp4", scale=scale, global_scale=whole, inverse=inverse)[0]


@functools.partial(jax.jit, static_argnums=0)
def _block_scales(operand: Operand, array: jax.Array, largest: jax.Array) -> jax.Array:
    """Blocks' scales times the tensor's (…, out, blocks)."""
    blocks = (*[1] * (array.ndim - 1), operand.block)
    return rounding.encode(array, operand, blocks, largest).unit[..., 0]


def _error(array: np.ndarray, stored: Stored, size: int) -> Error:
    difference = decode(stored).astype(np.float64) - array
    return Error(float((difference**2).sum()), float((array.astype(np.float64) ** 2).sum()), size, stored.nbytes)


def bits_of(errors: Mapping[tuple[int, str], Error], sizes: Mapping[tuple[int, str], int]) -> float:
    """Stored bits per weight of all units, scales included; those that are not quantised count as 16."""
    after = sum(errors[key].bytes_after * 8 if key in errors else size * BITS[PLAIN] for key, size in sizes.items())
    return after / max(sum(sizes.values()), 1)
