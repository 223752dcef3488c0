"""Writes an Orogen checkpoint folder whose weights are quantised, a tensor at a time, from a Hugging Face folder.

The tensors keep the names, the packing and the description that NVIDIA/Model-Optimizer gives them
(`convert/quantization.py`), so that `orogen convert to-hf` has nothing to compute.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import (
    AS_STORED,
    CONFIG,
    GENERATION,
    KEPT,
    TOKENIZER_FILES,
    HuggingFaceFolder,
    copy_files,
)
from orogen.compress.units import Weight, weights_of
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.load import model_text
from orogen.config.precision import GROUPS, KINDS
from orogen.config.quantize import BITS, PLAIN, ROUTED, Target
from orogen.config.rounded import Operand
from orogen.convert.parts import Parts, module_of, parts_of
from orogen.convert.quantization import FIELD, FILE, MIXED, MODELOPT
from orogen.convert.tensor_files import Spec, TensorWriter, new_folder
from orogen.precision import rounding
from orogen.precision.stored import E4M3, Stored, decode, encode, float32_scale, largest_magnitudes, nvfp4_bound

# The name of a format in a file's description, with rounded inputs and without.
ALGORITHMS = {
    ("fp8", True): "FP8", ("fp8", False): "FP8",
    ("fp8_channel", True): "FP8_PER_CHANNEL_PER_TOKEN", ("fp8_channel", False): "FP8_PER_CHANNEL_PER_TOKEN",
    ("nvfp4", True): "NVFP4", ("nvfp4", False): "W4A16_NVFP4",
}  # fmt: skip
FP8_LARGEST = 448.0
SCALAR = Spec((), np.dtype(np.float32))


class Entry(NamedTuple):
    """One quantised tensor. group: the tensors that share a float32 scale."""

    weight: Weight
    target: Target
    parts: Parts
    group: tuple[Any, ...]


class Error(NamedTuple):
    """Of weights after rounding: the sum of squared errors, that of squares, bytes before and after."""

    errors: float = 0.0
    squares: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0

    def plus(self, other: "Error") -> "Error":
        """Both together."""
        return Error(*(a + b for a, b in zip(self, other, strict=True)))


def entries_of(folder: HuggingFaceFolder, targets: Sequence[Mapping[str, Target]]) -> dict[str, Entry]:
    """The tensors that become quantised, by name. targets: by layer and kind; others stay. Raises ConfigError for a
    folder that is quantised already."""
    tensors = folder.tensors
    if tensors.quantization:
        raise ConfigError(f"{str(folder.folder)!r} is quantised; expected a checkpoint that is not")
    found = {}
    for name, weight in weights_of(tensors.table, folder.config).items():
        target = targets[weight.layer].get(weight.kind)
        if target is None or target.format == PLAIN:
            continue
        parts = parts_of(name, tensors.table[name], MODELOPT[ALGORITHMS[target.format, target.inputs]])
        alone = weight.kind in GROUPS[ROUTED]
        group = (name,) if alone else (weight.layer, weight.kind, min(weight.calls))
        found[name] = Entry(weight, target, parts, group)
    return found


def write_quantised(
    folder: HuggingFaceFolder, entries: Mapping[str, Entry], target: Path, *, maxima: np.ndarray | None
) -> dict[tuple[int, str], Error]:
    """Writes the Orogen folder `target`; returns the error of each unit's weights, by layer and name.

    maxima: (layers, kinds, calls) of calibration, for static scales of inputs. Raises ConfigError for a weight that is
    not finite, and then leaves no `target`.
    """
    tensors, found = folder.tensors, {}
    values = {**folder.values, FIELD: {"quant_method": "modelopt", **description(folder, entries)}}
    groups = _shared_magnitudes(folder, entries)
    specs = {name: tensors.reader.specs[stored] for name, stored in tensors.stored.items() if name not in entries}
    for entry in entries.values():
        specs |= entry.parts.specs
        specs |= dict.fromkeys(_input_names(entry), SCALAR)
    with new_folder(target) as scratch:
        with TensorWriter(scratch, specs) as writer:
            for name, stored_name in tensors.stored.items():
                if name not in entries:
                    writer.write(name, tensors.reader.read(stored_name))
            for name, entry in entries.items():
                array = _oriented(tensors.tensor(name), entry)
                stored = encoded(array, entry.target, groups[entry.group])
                for part, numbers in entry.parts.arrays(stored).items():
                    writer.write(part, numbers)
                for part in _input_names(entry):
                    writer.write(part, _input_scale(entry, maxima))
                key = entry.weight.layer, entry.weight.unit
                size = tensors.dtype(name).itemsize * array.size
                found[key] = found.get(key, Error()).plus(_error(array, stored, size))
        source = folder.folder / "tokenizer" if folder.stored else folder.folder
        copy_files(TOKENIZER_FILES, source, scratch / "tokenizer")
        copy_files([GENERATION], folder.folder, scratch)
        quantization = {"producer": {"name": "orogen"}, "quantization": description(folder, entries)}
        write_atomically(scratch / FILE, (json.dumps(quantization, indent=2) + "\n").encode())
        kept = {"config": values, "tensors": AS_STORED}
        write_atomically(scratch / KEPT, (json.dumps(kept, indent=2) + "\n").encode())
        write_atomically(scratch / CONFIG, model_text(folder.config).encode())
        checksums.write(scratch)
    return found


def description(folder: HuggingFaceFolder, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """What ModelOpt's files say of the formats: one for all linear maps but excluded ones, or one for each."""
    algorithms = {module_of(n): ALGORITHMS[e.target.format, e.target.inputs] for n, e in entries.items()}
    cache = {"kv_cache_quant_algo": None}
    if len(set(algorithms.values())) > 1:
        layers = {name: _algorithm(algorithm) for name, algorithm in sorted(algorithms.items())}
        return {"quant_algo": MIXED, **cache, "quantized_layers": layers}
    (algorithm,) = set(algorithms.values())
    table = folder.tensors.table
    linear = {module_of(name) for name, tensor in table.items() if len(tensor.shape) > 1}
    return {**_algorithm(algorithm), **cache, "exclude_modules": sorted(linear - algorithms.keys())}


def _algorithm(name: str) -> dict[str, Any]:
    return {"quant_algo": name} | ({"group_size": MODELOPT[name].block[1]} if "NVFP4" in name else {})


def _input_names(entry: Entry) -> list[str]:
    """The tensor of the input's static scale, if there is one."""
    if not entry.target.inputs or entry.target.format == "fp8_channel":
        return []
    names = entry.parts.scheme.names
    return [entry.parts.scale.removesuffix(names.scale) + names.inputs[0]]


def _input_scale(entry: Entry, maxima: np.ndarray | None) -> np.ndarray:
    assert maxima is not None, "static scales come from calibration"
    weight = entry.weight
    largest = maxima[weight.layer, KINDS.index(weight.kind), sorted(weight.calls)].max()
    return float32_scale(largest, nvfp4_bound() if entry.target.format == "nvfp4" else FP8_LARGEST)


def _oriented(array: np.ndarray, entry: Entry) -> np.ndarray:
    """The tensor as (…, out, in), in float32."""
    return (array.swapaxes(-1, -2) if entry.parts.turned else array).astype(np.float32)


def _shared_magnitudes(folder: HuggingFaceFolder, entries: Mapping[str, Entry]) -> dict[tuple[Any, ...], np.ndarray]:
    """The largest magnitude of each group's matrices."""
    found: dict[tuple[Any, ...], np.ndarray] = {}
    for name, entry in entries.items():
        largest = largest_magnitudes(_oriented(folder.tensors.tensor(name), entry), "fp8_tensor")
        if not np.isfinite(largest).all():
            raise ConfigError(f"{folder.folder}: {name} has a number that is not finite; expected finite weights")
        found[entry.group] = np.maximum(found.get(entry.group, largest), largest)
    return found


def encoded(array: np.ndarray, target: Target, largest: np.ndarray) -> Stored:
    """Matrices (…, out, in) as the target stores them. largest: (…) of all matrices that share the scale."""
    if target.format == "fp8":
        return encode(array, "fp8_tensor", largest=largest)[0]
    if target.format == "fp8_channel":
        return encode(array, "fp8_channel")[0]
    bound = rounding.LARGEST_SCALE_OF_TWO if target.scales == "four_over_six" else rounding.LARGEST_SCALE
    whole = float32_scale(largest, nvfp4_bound(bound))
    if target.scales == "max":
        return encode(array, "nvfp4", global_scale=whole)[0]
    unit = _block_scales(target.weight, array, largest[..., None, None])
    scale = np.asarray(unit, np.float64) / whole.astype(np.float64)[..., None, None]
    # The quotient is within 2^-22 of one of E4M3's numbers, which is the nearest.
    return encode(array, "nvfp4", scale=scale.astype(np.float32).astype(E4M3), global_scale=whole)[0]


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
