"""The three kinds of folder that hold a model: run folders, Orogen folders and Hugging Face folders.

An Orogen checkpoint folder holds config.gin, the parameters in safetensors files under our names, tokenizer/, and
huggingface.json, which keeps what the Hugging Face folder said beyond a ModelConfig.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.checkpoint import checksums
from orogen.checkpoint.leaves import (
    check_finite,
    check_shapes,
    dotted,
    in_dtype,
    key_of,
    laid_out,
    read_leaves,
    shardings_of,
)
from orogen.checkpoint.steps import Checkpoints, with_shardings
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import read_json
from orogen.config.load import load_saved
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.convert import names
from orogen.convert.config import mtp_blocks, read_config
from orogen.convert.tensor_files import Spec, TensorReader
from orogen.data.tokenizer import Tokenizer
from orogen.model.layout import Layout
from orogen.model.lm import Built, build
from orogen.parallel.plan import Plan

CONFIG, KEPT, GENERATION = "config.gin", "huggingface.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Folder(Protocol):
    """A folder that holds a model. Use as a context manager.

    plan: the run's; None for other folders. masters: whether the parameters are a run's float32 master weights, which
    an export writes in a narrower dtype by default.
    """

    config: ModelConfig
    plan: PlanConfig | None
    masters: bool

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None if there is none. Raises ConfigError."""
        ...

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """Parameters and buffers in the layout of `built` and the shardings of the plan; exact to the bit if `dtype` is
        theirs in the folder. Parameters that are used in float32 stay float32, and so do all buffers. Raises
        ConfigError with every parameter that is missing, surplus or of another shape."""
        ...

    def keep(self, run_dir: Path) -> None:
        """Copies to the folder of a run that starts from this one what its export to Hugging Face will need."""
        ...


class RunFolder:
    """The latest checkpoint of a run folder, or that of `step`. Only its config is read until more is needed."""

    masters = True

    def __init__(self, folder: Path, step: int | None = None):
        self.folder, self._run, self._step = folder, read_run_config(folder), step
        self.config = self._run.model
        self.plan: PlanConfig | None = self._run.plan

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def row_length(self) -> int:
        """Tokens per sequence in training: of its longest phase."""
        return max(one.sequence_length for one in self._run.need("train").stretches())

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`. Its files are checked against the checkpoint; prompts get a bos, as documents did."""
        with Checkpoints(self.folder, only=self._step) as checkpoints:
            checkpoints.check_tokenizer()
        found = read_tokenizer(self.folder / "tokenizer")
        return None if found is None else found.as_in_training()

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`. Arrays in another layout are restored onto the devices and converted there."""

        def target(saved: Layout) -> dict[str, Any]:
            stored = built if saved == built.layout else build(self.config, saved, built.vocab_rows)
            trees = {"params": in_dtype(stored.params, dtype), "buffers": stored.buffers}
            return with_shardings(trees, shardings_of(trees, saved, built, plan))

        with Checkpoints(self.folder, vocab_size=self.config.vocab_size, only=self._step) as checkpoints:
            saved, model = checkpoints.restore_model(self.config, target)
        check_finite(self.folder, model["params"])
        return laid_out((model["params"], model["buffers"]), saved, built, plan)

    def keep(self, run_dir: Path) -> None:
        """See `Folder.keep`."""
        copy_files([GENERATION, KEPT], self.folder, run_dir)


class OrogenFolder:
    """The parameters of an Orogen checkpoint folder.

    The first read of parameters compares all files with the folder's checksums (earlier releases wrote none) and raises
    ConfigError with the name of a damaged file.
    """

    plan: PlanConfig | None = None
    masters = False

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_run_config(folder).model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if "reader" in vars(self):
            self.reader.__exit__(*exception)

    @functools.cached_property
    def reader(self) -> TensorReader:
        """A reader of the folder's tensors; the files are checked first."""
        if (self.folder / checksums.NAME).exists():
            checksums.check(self.folder)
        return TensorReader(self.folder)

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`."""
        return read_tokenizer(self.folder / "tokenizer")

    def parameters(self) -> dict[names.Path, Spec]:
        """Shape and dtype of every parameter."""
        return {tuple(key_of(part) for part in name.split(".")): spec for name, spec in self.reader.specs.items()}

    def parameter(self, path: names.Path, spec: Spec) -> np.ndarray:
        """A parameter, whole."""
        return self.piece(path, ())

    def piece(self, path: names.Path, index: tuple[int, ...]) -> np.ndarray:
        """A parameter at `index` of its leading axes."""
        return self.reader.read(dotted(path), index)

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`."""
        return read_leaves(self, built, plan, dtype)

    def keep(self, run_dir: Path) -> None:
        """See `Folder.keep`."""
        copy_files([GENERATION, KEPT], self.folder, run_dir)


class HuggingFaceFolder:
    """The tensors of a Hugging Face folder, checked against the table of its family.

    Raises ConfigError with every tensor that is missing, surplus or of another shape, or with a copy that differs from
    its original.
    """

    plan: PlanConfig | None = None
    masters = False

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{str(folder)!r} has no config.json; expected a Hugging Face folder")
        self.values = read_json(folder / "config.json")
        self.reader = TensorReader(folder, ignored=names.ignored(self.values.get("model_type")))
        try:
            self._match(folder)
        except BaseException:
            self.reader.__exit__()
            raise

    def _match(self, folder: Path) -> None:
        self.family, config = read_config(self.values)
        canonical = names.FAMILIES[self.family].canonical
        self.stored = {found: name for name in self.reader.specs if (found := canonical(name)) is not None}
        if config.layers.mtp and not any(map(names.mtp_name(self.family, config), self.stored)):
            self.family, config = read_config(self.values, mtp=False)
        config = self._untied(config)
        self.config = config
        self.table = names.table(self.family, config, mtp_blocks=mtp_blocks(self.values))
        have = {name: self.reader.specs[stored].shape for name, stored in self.stored.items()}
        optional = {name for name, tensor in self.table.items() if tensor.optional}
        check_shapes(folder, have, {name: tensor.shape for name, tensor in self.table.items()}, optional)
        self.copies = sorted(optional & have.keys())
        for name in self.copies:
            original = self.table[name].copy_of
            if original is not None and not self.reader.equal(self.stored[name], self.stored[original]):
                raise ConfigError(f"{folder}: {name} is not equal to {original}; expected a copy of it")

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.reader.__exit__(*exception)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, by its name in the table."""
        return self.reader.read(self.stored[name])

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype in the file."""
        return self.reader.specs[self.stored[name]].dtype

    def parameters(self) -> dict[names.Path, Spec]:
        """Shape and dtype of every parameter; the dtype is the narrowest that holds all its pieces."""
        dtypes: dict[names.Path, np.dtype] = {}
        for name, tensor in self.table.items():
            for piece in tensor.pieces:
                dtypes[piece.path] = promoted([self.dtype(name), *filter(None, [dtypes.get(piece.path)])])
        return {path: Spec(shape, dtypes[path]) for path, shape in names.leaf_shapes(self.table).items()}

    def parameter(self, path: names.Path, spec: Spec) -> np.ndarray:
        """A parameter, assembled from its pieces."""
        return self._assembled(path, (), spec)

    def piece(self, path: names.Path, index: tuple[int, ...]) -> np.ndarray:
        """A parameter at `index` of its leading axes, from the tensors that hold a part of it."""
        return self._assembled(path, index, self._specs[path])

    def _assembled(self, path: names.Path, index: tuple[int, ...], spec: Spec) -> np.ndarray:
        depth = len(index)
        array = np.empty(spec.shape[depth:], spec.dtype)
        for name, piece in self._pieces[path]:
            if piece.index[:depth] == index[: len(piece.index)]:
                part = piece.take(self.tensor(name))
                array[piece.index[depth:]] = part[index[len(piece.index) :]]
        return array

    @functools.cached_property
    def _specs(self) -> dict[names.Path, Spec]:
        return self.parameters()

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`."""
        return read_tokenizer(self.folder)

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`."""
        return read_leaves(self, built, plan, dtype)

    def keep(self, run_dir: Path) -> None:
        """See `Folder.keep`."""
        copy_files([GENERATION], self.folder, run_dir)
        kept = {"config": self.values}
        write_atomically(run_dir / KEPT, (json.dumps(kept, indent=2) + "\n").encode())

    @functools.cached_property
    def _pieces(self) -> dict[names.Path, list[tuple[str, names.Piece]]]:
        found: dict[names.Path, list[tuple[str, names.Piece]]] = {}
        for name, tensor in self.table.items():
            for piece in tensor.pieces:
                found.setdefault(piece.path, []).append((name, piece))
        return found


def read_run_config(folder: Path) -> RunConfig:
    """The config.gin of a run folder or an Orogen checkpoint folder, with at least a model. Raises ConfigError."""
    try:
        config = load_saved(folder / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    return config.need("model")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, None if it has none."""
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def copy_files(files: Iterable[str], source: Path, target: Path) -> None:
    """Copies those of the files that exist."""
    for file in files:
        if (source / file).is_file():
            target.mkdir(exist_ok=True)
            write_atomically(target / file, (source / file).read_bytes())


def promoted(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all of them."""
    first, *rest = set(dtypes)
    for dtype in rest:
        first = np.dtype(jnp.promote_types(first, dtype))
    return first
