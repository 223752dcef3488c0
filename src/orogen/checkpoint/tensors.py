"""The tensors of a Hugging Face checkpoint as the parameters of a model; quantised tensors are decoded one at a
time."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from orogen.checkpoint.cache_scales import scales_of
from orogen.checkpoint.leaves import check_shapes
from orogen.config.checks import ConfigError
from orogen.config.json_file import read_json
from orogen.config.model import ModelConfig
from orogen.config.recipe import Scales
from orogen.convert import names
from orogen.convert.config import mtp_blocks, read_config
from orogen.convert.parts import Matched, Parts, match
from orogen.convert.quantization import FIELD, FILE, FP8_CACHE, read_quantization
from orogen.convert.tensor_files import Spec, TensorReader
from orogen.precision.stored import Stored, decode

DECODED = np.dtype(np.float32)


class HuggingFaceTensors:
    """The tensors of a folder, by their names in the table of its family.

    values: the folder's config.json. config: the model, if it is known. Raises ConfigError with every tensor that is
    missing, surplus or of another shape, or with a copy that differs from its original.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], config: ModelConfig | None = None):
        self.folder, self.values = folder, dict(values)
        other = read_json(folder / FILE) if (folder / FILE).is_file() else None
        self.quantization = read_quantization(values, other)
        ignored = names.ignored(values.get("model_type"))
        self.reader = TensorReader(folder, ignored=ignored, quantised=bool(self.quantization))
        try:
            self._match(config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files."""
        self.reader.__exit__()

    def _match(self, config: ModelConfig | None) -> None:
        self.family, stated = read_config(self.values)
        canonical = names.FAMILIES[self.family].canonical
        self.stored = {found: name for name in self.reader.specs if (found := canonical(name)) is not None}
        if config is None:
            config = stated
            if config.layers.mtp and not any(map(names.mtp_name(self.family, config), self.stored)):
                config = read_config(self.values, mtp=False)[1]
            config = self._untied(config)
        self.config = config
        self.table = names.table(self.family, config, mtp_blocks=mtp_blocks(self.values))
        self.parts = self._parts()
        optional = {name for name, tensor in self.table.items() if tensor.optional}
        inside = {part for parts in self.parts.values() for part in parts.names}
        have = {name: self._spec(name).shape for name in self.stored if name not in inside and name not in self.scales}
        have |= {name: parts.shape for name, parts in self.parts.items()}
        check_shapes(self.folder, have, {name: tensor.shape for name, tensor in self.table.items()}, optional)
        self.copies = sorted(optional & have.keys())
        for name in self.copies:
            original = self.table[name].copy_of
            if original is not None and not self._equal(name, original):
                raise ConfigError(f"{self.folder}: {name} is not equal to {original}; expected a copy of it")

    def _parts(self) -> dict[str, Parts]:
        """The quantised tensors. Raises ConfigError if a description of the quantisation does not match them."""
        have = {name: self._spec(name) for name in self.stored}
        unquantised = names.mtp_name(self.family, self.config)
        every = [match(quantization, self.table, have, unquantised) for quantization in self.quantization]
        if len(every) == 2 and every[0] != every[1]:
            first, second = (one.where for one in self.quantization)
            raise ConfigError(f"{self.folder}: {first} and {second} differ; expected the same formats")
        found = every[0] if every else Matched({}, frozenset())
        self.scales = found.scales
        return found.parts

    def _spec(self, name: str) -> Spec:
        return self.reader.specs[self.stored[name]]

    def _equal(self, first: str, second: str) -> bool:
        """Whether two tensors of the table are the same bytes."""
        pairs = zip(self._files(first), self._files(second), strict=False)
        return len(self._files(first)) == len(self._files(second)) and all(self.reader.equal(*pair) for pair in pairs)

    def _files(self, name: str) -> list[str]:
        return [self.stored[part] for part in (self.parts[name].names if name in self.parts else (name,))]

    def _untied(self, config: ModelConfig) -> ModelConfig:
        """The model, untied if its head differs from its embedding and the family's class ignores
        tie_word_embeddings."""
        family, (head, embedding) = names.FAMILIES[self.family], names.head_and_embedding(self.family)
        both = head in self.stored and embedding in self.stored
        if family.ties or not config.tie_word_embeddings or not both:
            return config
        if self.reader.equal(self.stored[head], self.stored[embedding]):
            return config
        return dataclasses.replace(config, tie_word_embeddings=False)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, by its name in the table; decoded, in float32, if it is quantised."""
        stored = self.quantised(name)
        if stored is None:
            return self.reader.read(self.stored[name])
        array = decode(stored)
        return array.swapaxes(-1, -2) if self.parts[name].turned else array

    def quantised(self, name: str) -> Stored | None:
        """A tensor as it is stored (…, out, in), None if it is not quantised."""
        if name not in self.parts:
            return None
        return self.parts[name].read(lambda part: self.reader.read(self.stored[part]))

    def dtype(self, name: str) -> np.dtype:
        """The dtype of `tensor(name)`."""
        return DECODED if name in self.parts else self._spec(name).dtype

    def parameters(self) -> dict[names.Path, Spec]:
        """Shape and dtype of every parameter; the dtype is the narrowest that holds all its pieces."""
        dtypes: dict[names.Path, np.dtype] = {}
        for name, tensor in self.table.items():
            for piece in tensor.pieces:
                dtypes[piece.path] = promoted([self.dtype(name), *filter(None, [dtypes.get(piece.path)])])
        return {path: Spec(shape, dtypes[path]) for path, shape in names.leaf_shapes(self.table).items()}

    def piece(self, path: names.Path, index: tuple[int, ...]) -> np.ndarray:
        """A parameter at `index` of its leading axes, from the tensors that hold a part of it."""
        return self.assembled(path, index, self._specs[path])

    def assembled(self, path: names.Path, index: tuple[int, ...], spec: Spec) -> np.ndarray:
        """A parameter of shape and dtype `spec` at `index` of its leading axes."""
        depth = len(index)
        array = np.empty(spec.shape[depth:], spec.dtype)
        for name, piece in self.pieces[path]:
            if piece.index[:depth] == index[: len(piece.index)]:
                part = piece.take(self.tensor(name))
                array[piece.index[depth:]] = part[index[len(piece.index) :]]
        return array

    @functools.cached_property
    def cache_scales(self) -> tuple[Scales | str | None, ...] | None:
        """See `scales_of`: of keys and values in FP8; None unless the files say that these are in FP8."""
        if not any(one.cache == FP8_CACHE for one in self.quantization):
            return None
        return scales_of(self.table, self.config, self.stored, lambda name: self.reader.read(self.stored[name]))

    @functools.cached_property
    def _specs(self) -> dict[names.Path, Spec]:
        return self.parameters()

    @functools.cached_property
    def pieces(self) -> dict[names.Path, list[tuple[str, names.Piece]]]:
        """The tensors and their pieces of which each parameter consists."""
        found: dict[names.Path, list[tuple[str, names.Piece]]] = {}
        for name, tensor in self.table.items():
            for piece in tensor.pieces:
                found.setdefault(piece.path, []).append((name, piece))
        return found


def unquantised(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says about quantised weights."""
    return {name: value for name, value in values.items() if name != FIELD}


def promoted(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all of them."""
    first, *rest = set(dtypes)
    for dtype in rest:
        first = np.dtype(jnp.promote_types(first, dtype))
    return first
