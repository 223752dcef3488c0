"""Writes a checkpoint whose weights are quantised: an Orogen folder that exports as ModelOpt or compressed-tensors.

The folder keeps the tensors of the Hugging Face layout, in which formats are defined: of a weight (out, in), with one
scale for what the layout holds as one matrix (`HuggingFaceFolder.stored`).
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import (
    AS_STORED,
    CONFIG,
    GENERATION,
    KEPT,
    TOKENIZER_FILES,
    HuggingFaceFolder,
    OrogenFolder,
    RunFolder,
    copy_files,
)
from orogen.checkpoint.transfer import Fits, Layout, folder_tensors, layout_of
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.text import model_text
from orogen.convert.describe import Description
from orogen.convert.names import Table
from orogen.convert.parts import Parts, is_linear, module_of, parts_of
from orogen.convert.quantization import FILE, read_quantization
from orogen.convert.tensor_files import Spec, TensorWriter, new_folder
from orogen.precision.stored import Stored

# Encodes a weight (…, out, in) in float32, given the name of its module and how it is stored.
Encode = Callable[[str, np.ndarray, Parts], Stored]


def linear_modules(table: Table) -> list[str]:
    """The modules of all linear maps of a checkpoint, among which a recipe chooses."""
    return list(dict.fromkeys(module_of(name) for name, tensor in table.items() if tensor.pieces and is_linear(tensor)))


def parts_by_name(table: Table, description: Description) -> dict[str, Parts]:
    """How each tensor of the table that `description` names is stored."""
    quantization, found = read_quantization(description.values)[0], {}
    for name, tensor in table.items():
        scheme = quantization.scheme(module_of(name), linear=is_linear(tensor)) if tensor.pieces else None
        if scheme is not None and len(tensor.shape) > 1 and is_linear(tensor):
            found[name] = parts_of(name, tensor, scheme)
    return found


def write_quantised(
    folder: RunFolder | OrogenFolder | HuggingFaceFolder,
    target: Path,
    description: Description,
    encode: Encode,
    *,
    scales: Mapping[str, np.ndarray] | None = None,
    dtype: str | None = None,
    fits: Fits = lambda tensor, held: None,
) -> int:
    """Writes the model of `folder` into the quantised Orogen folder `target`; returns the bytes of its tensors.

    description: of `convert.describe`. scales: of inputs and of the key/value cache, by the names of their tensors.
    dtype: of what is not quantised; None: that of a folder's parameters, bfloat16 for a run's. One tensor is in memory
    at a time. Raises ConfigError, and then leaves no `target`.
    """
    specs, read = folder_tensors(folder)
    dtype = dtype or ("bfloat16" if folder.masters else None)
    layout = layout_of(folder.config, specs, read, folder.folder, dtype=dtype)
    parts, scales = parts_by_name(layout.table, description), dict(scales or {})
    if not parts:
        raise ConfigError(f"{folder.folder}: no weight is to be quantised; expected one at least")
    wanted = {name: array_spec(array) for name, array in scales.items()}
    for name, spec in layout.specs.items():
        wanted |= parts[name].specs if name in parts else {name: spec}
    largest = max(layout.table, key=lambda name: math.prod(layout.table[name].shape))
    fits(largest, 4 * math.prod(layout.table[largest].shape))
    kept = {"config": layout.values | description.values, "tensors": AS_STORED}
    with new_folder(target) as scratch:
        with TensorWriter(scratch, wanted) as writer:
            _write_tensors(writer, layout, parts, encode)
            for name, array in scales.items():
                writer.write(name, np.asarray(array))
        _write_rest(folder, scratch, kept, description.other)
        checksums.write(scratch)
    return sum(spec.nbytes for spec in wanted.values())


def array_spec(array: Any) -> Spec:
    """The shape and dtype of an array."""
    return Spec(np.shape(array), np.asarray(array).dtype)


def _write_tensors(writer: TensorWriter, layout: Layout, parts: Mapping[str, Parts], encode: Encode) -> None:
    for name in layout.table:
        if name not in parts:
            writer.write(name, layout.tensor(name))
            continue
        whole = layout.tensor(name, np.dtype(np.float32))
        whole = whole.swapaxes(-1, -2) if parts[name].turned else whole
        stored, scheme = encode(name, whole, parts[name]), parts[name].scheme
        if (stored.format, stored.block, stored.inverse) != (scheme.kind, scheme.block, scheme.inverse):
            raise ValueError(f"{name} is encoded in {stored.format}; expected {scheme}")
        for part, array in parts[name].arrays(stored).items():
            writer.write(part, np.asarray(array))


def _write_rest(folder: Any, target: Path, kept: dict[str, Any], other: dict[str, Any] | None) -> None:
    source, inside = folder.folder, folder.folder / "tokenizer"
    copy_files(TOKENIZER_FILES, inside if inside.is_dir() else source, target / "tokenizer")
    copy_files([GENERATION], source, target)
    write_atomically(target / KEPT, (json.dumps(kept, indent=2) + "\n").encode())
    if other is not None:
        write_atomically(target / FILE, (json.dumps(other, indent=4) + "\n").encode())
    write_atomically(target / CONFIG, model_text(folder.config).encode())
