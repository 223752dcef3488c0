"""Writes a new checkpoint folder from an old one, layer by layer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import (
    CONFIG,
    GENERATION,
    TOKENIZER_FILES,
    HuggingFaceFolder,
    OrogenFolder,
    RunFolder,
    copy_files,
)
from orogen.checkpoint.leaves import check_shapes, dotted, leaves_of
from orogen.checkpoint.tensors import promoted
from orogen.checkpoint.transfer import folder_tensors
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.convert.names import Path as Leaf
from orogen.convert.tensor_files import Spec, TensorWriter, new_folder
from orogen.model.homes import Home, homes
from orogen.model.lm import build

# Parameters of one layer, by their paths below it. One that is made on demand is in memory alone.
Arrays = Mapping[Leaf, np.ndarray]


class Source:
    """The parameters of a checkpoint folder, by layer. A run's are in memory, those of other folders on disk.

    Raises ConfigError unless they are those of its config.
    """

    def __init__(self, folder: RunFolder | OrogenFolder | HuggingFaceFolder):
        self.config = folder.config
        self.homes = homes(self.config)
        self.specs, self._read = folder_tensors(folder)
        have, built = {dotted(path): spec.shape for path, spec in self.specs.items()}, build(self.config)
        leaves = leaves_of(built.params, built.buffers)
        check_shapes(folder.folder, have, {dotted(path): leaf.get_value().shape for path, leaf in leaves.items()})

    def layer(self, number: int) -> "LayerOf":
        """The parameters of a layer."""
        return LayerOf(self, self.homes[number])

    def read(self, path: Leaf, index: tuple[int, ...] = ()) -> np.ndarray:
        """A parameter at `index` of its leading axes."""
        return self._read(path, index)


class LayerOf:
    """One layer's parameters, read on demand."""

    def __init__(self, source: Source, home: Home):
        self._source, self.letter, self._home = source, home.letter, home
        size = len(home.path)
        self.names = [path[size:] for path in source.specs if path[:size] == home.path]

    def __getitem__(self, name: Leaf) -> np.ndarray:
        return self._source.read((*self._home.path, *name), self._home.index)

    def arrays(self) -> Arrays:
        """All of them."""
        return {name: self[name] for name in self.names}


class Maker(Protocol):
    """Makes the parameters of a new model from those of an old one."""

    def layer(self, number: int) -> Arrays:
        """Those of the new model's layer `number`, by their paths below it."""
        ...

    def rest(self, path: Leaf) -> np.ndarray:
        """One outside the layers."""
        ...


def rewrite(
    source: Source, maker: Maker, config: ModelConfig, folder: Path, target: Path,
    *, fits: Callable[[str, int], None] = lambda tensor, held: None, parameters: int | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:  # fmt: skip
    """Writes the model of `config` that `maker` makes into the new Orogen checkpoint folder `target`.

    A parameter has the dtype of those of the same name in the old model, or that of most of its parameters; what is
    used in float32 is float32 if it is new. folder: the old folder, for its tokenizer. fits: takes a parameter's name
    and bytes, and raises ConfigError if memory cannot hold it. parameters: how many are expected in all, None for any
    number. beside: further files, by name. Raises ConfigError if the maker's parameters are not those of the config, or
    not finite; then there is no `target`.
    """
    wanted = _specs(source, config)
    largest = max(wanted, key=lambda path: wanted[path].nbytes)
    fits(dotted(largest), wanted[largest].nbytes)
    layers, written = homes(config), 0
    with new_folder(target) as scratch:
        with TensorWriter(scratch, {dotted(path): spec for path, spec in wanted.items()}) as writer:
            inside = set()
            for number, home in enumerate(layers):
                size = len(home.path)
                arrays = maker.layer(number)
                expected = {path[size:] for path in wanted if path[:size] == home.path}
                _check_names(number, set(arrays), expected)
                for name, array in arrays.items():
                    path = (*home.path, *name)
                    inside.add(path)
                    spec = wanted[path]
                    _check_array(path, array, spec.shape[len(home.index) :])
                    writer.write(dotted(path), array.astype(spec.dtype), home.index)
                    written += array.size
            for path in wanted.keys() - inside:
                array, spec = maker.rest(path), wanted[path]
                _check_array(path, array, spec.shape)
                writer.write(dotted(path), array.astype(spec.dtype))
                written += array.size
        if parameters is not None and written != parameters:
            raise ConfigError(f"{written:,} parameters were made; expected {parameters:,}, as the config has")
        copy_files(TOKENIZER_FILES, _tokenizer(folder), scratch / "tokenizer")
        copy_files([GENERATION], folder, scratch)
        write_atomically(scratch / CONFIG, model_text(config).encode())
        for name, content in (beside or {}).items():
            write_atomically(scratch / name, content)
        checksums.write(scratch)


def _specs(source: Source, config: ModelConfig) -> dict[Leaf, Spec]:
    """Shape and dtype of each parameter of the new model."""
    dtypes: dict[Leaf, list[np.dtype]] = {}
    sizes: dict[np.dtype, int] = {}
    for path, spec in source.specs.items():
        dtypes.setdefault(_stem(path), []).append(spec.dtype)
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    usual, single = max(sizes, key=lambda dtype: sizes[dtype]), np.dtype(np.float32)
    built = build(config)
    found = {path: Spec(leaf.get_value().shape, single) for path, leaf in leaves_of(built.buffers).items()}
    for path, leaf in leaves_of(built.params).items():
        new = [single if leaf.get_metadata().get("float32") else usual]
        found[path] = Spec(leaf.get_value().shape, promoted(dtypes.get(_stem(path), new)))
    return found


def _stem(path: Leaf) -> Leaf:
    """The path without the numbers of layers."""
    return tuple(part for part in path if not isinstance(part, int))


def _tokenizer(folder: Path) -> Path:
    inside = folder / "tokenizer"
    return inside if inside.is_dir() else folder


def _check_names(number: int, have: set[Leaf], want: set[Leaf]) -> None:
    if have != want:
        missing, surplus = (sorted(map(dotted, names)) for names in (want - have, have - want))
        raise ConfigError(f"layer {number} lacks {missing} and has {surplus} beside; expected its config's parameters")


def _check_array(path: Leaf, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ConfigError(f"{dotted(path)} is {list(array.shape)}; expected {list(shape)}")
    with np.errstate(invalid="ignore"):  # infinities of both signs
        total = array.sum(dtype=np.float64)  # unlike an array of truths, a sum takes no memory
    if not np.isfinite(total):
        raise ConfigError(f"{dotted(path)} has a number that is not finite; expected finite weights")
