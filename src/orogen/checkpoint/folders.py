"""The three kinds of folder that hold a model: run folders, Orogen folders and Hugging Face folders.

An Orogen checkpoint folder holds config.gin, the parameters in safetensors files under our names, tokenizer/, and
huggingface.json, which keeps what the Hugging Face folder said beyond a ModelConfig. A quantised one holds the tensors
of a Hugging Face folder instead (`HuggingFaceFolder.stored`).
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np
from flax import nnx

from orogen.checkpoint import checksums
from orogen.checkpoint.held import Held
from orogen.checkpoint.leaves import (
    check_finite,
    dotted,
    in_dtype,
    key_of,
    laid_out,
    read_leaves,
    shardings_of,
)
from orogen.checkpoint.steps import Checkpoints, with_shardings
from orogen.checkpoint.tensors import HuggingFaceTensors, unquantised
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import ListOf, MapOf, Record, read_json
from orogen.config.load import load_saved
from orogen.config.lora import base_of
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.convert import names
from orogen.convert.tensor_files import Spec, TensorReader
from orogen.data.tokenizer import Tokenizer
from orogen.layers.adapter import apart, merged
from orogen.model.layout import Layout
from orogen.model.lm import Built, build
from orogen.parallel import placement
from orogen.parallel.plan import Plan

CONFIG, KEPT, GENERATION = "config.gin", "huggingface.json", "generation_config.json"
# Of huggingface.json. tensors: AS_STORED if the folder keeps the Hugging Face folder's tensors, as quantised ones do.
KEPT_FORM = Record({}, {"config": dict, "dtypes": MapOf(str), "copies": ListOf(str), "tensors": str})
AS_STORED = "huggingface"
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
        """Copies the files that an export to Hugging Face will need to the folder of a run that starts from this
        one."""
        ...


class ExtendedFolder:
    """A folder, opened as the model `config`, which has further parameters that are not in it. A subclass defines
    `read`, which draws them; all other methods are the folder's."""

    def __init__(self, folder: Folder, config: ModelConfig, seed: int):
        self.inner, self.config, self.seed = folder, config, seed
        self.plan: PlanConfig | None = folder.plan
        self.masters = folder.masters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.inner.__exit__(*exception)

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`."""
        return self.inner.tokenizer()

    def keep(self, run_dir: Path) -> None:
        """See `Folder.keep`."""
        self.inner.keep(run_dir)


class RunFolder:
    """The latest checkpoint of a run folder, or that of `step`. The constructor reads the config only.

    A run with adapters opens as the model with the adapters added to its weights.
    """

    masters = True

    def __init__(self, folder: Path, step: int | None = None):
        self.folder, self.run, self._step = folder, read_run_config(folder), step
        self.config = base_of(self.run.model)
        self.plan: PlanConfig | None = self.run.plan

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def row_length(self) -> int:
        """Tokens per sequence in training: of its longest phase."""
        return max(one.sequence_length for one in self.run.need("train").stretches())

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`. Its files are checked against the checkpoint; prompts get a bos, as documents did."""
        with Checkpoints(self.folder, only=self._step) as checkpoints:
            checkpoints.check_tokenizer()
        found = read_tokenizer(self.folder / "tokenizer")
        return None if found is None else found.as_in_training()

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`. Adapters are added to their weights."""
        if self.run.lora is None:
            return self.read_trained(built, plan, dtype)
        params, buffers = self.read_trained(build(self.run.model, built.layout, built.vocab_rows), plan, dtype)
        there = placement.shardings(built.params, plan)
        add = jax.jit(merged, static_argnums=2, out_shardings=there, donate_argnums=0)
        return add(*apart(params), self.run.lora.scale), buffers

    def read_trained(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """The parameters and buffers that the run trains, which may be those of adapters too, in the layout of `built`.
        Arrays in another layout are restored onto the devices and converted there."""

        def target(saved: Layout) -> dict[str, Any]:
            stored = built if saved == built.layout else build(self.run.model, saved, built.vocab_rows)
            trees = {"params": in_dtype(stored.params, dtype), "buffers": stored.buffers}
            return with_shardings(trees, shardings_of(trees, saved, built, plan))

        with Checkpoints(self.folder, vocab_size=self.config.vocab_size, only=self._step) as checkpoints:
            saved, model = checkpoints.restore_model(self.run.model, target)
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
        check_files(self.folder)
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
    """Parameters as the tensors of a Hugging Face folder, checked against the table of its family, and decoded if they
    are quantised.

    stored: whether it is an Orogen checkpoint folder that is quantised. Such a folder keeps the tensors, numbers and
    scales, of the Hugging Face folder, since several parameters may share a scale; its config.json is in
    huggingface.json, and its files are checked as those of an OrogenFolder. Raises ConfigError with every tensor that
    is missing, surplus or of another shape, or with a copy that differs from its original.
    """

    plan: PlanConfig | None = None
    masters = False

    def __init__(self, folder: Path, *, stored: bool = False):
        self.folder, self.stored = folder, stored
        if stored:
            self.values: dict[str, Any] = read_kept(folder).get("config", {})
            self.config = read_run_config(folder).model
            return
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{str(folder)!r} has no config.json; expected a Hugging Face folder")
        self.values = read_json(folder / "config.json")
        self.config = self.tensors.config

    @functools.cached_property
    def tensors(self) -> HuggingFaceTensors:
        """The folder's tensors."""
        if not self.stored:
            return HuggingFaceTensors(self.folder, self.values)
        check_files(self.folder)
        return HuggingFaceTensors(self.folder, self.values, self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if "tensors" in vars(self):
            self.tensors.close()

    def parameters(self) -> dict[names.Path, Spec]:
        """Shape and dtype of every parameter."""
        return self.tensors.parameters()

    def parameter(self, path: names.Path, spec: Spec) -> np.ndarray:
        """A parameter, assembled from its pieces."""
        return self.tensors.assembled(path, (), spec)

    def piece(self, path: names.Path, index: tuple[int, ...]) -> np.ndarray:
        """A parameter at `index` of its leading axes, from the tensors that hold a part of it."""
        return self.tensors.piece(path, index)

    def tokenizer(self) -> Tokenizer | None:
        """See `Folder.tokenizer`."""
        return read_tokenizer(self.folder / "tokenizer" if self.stored else self.folder)

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`."""
        return read_leaves(self, built, plan, dtype)

    def read_held(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """As `read`, but weights of products that are stored in FP8 stay so (`precision.scaled`)."""
        return read_leaves(self, built, plan, dtype, hold=Held(self.tensors).array)

    def keep(self, run_dir: Path) -> None:
        """See `Folder.keep`. The run's parameters are not quantised."""
        copy_files([GENERATION], self.folder, run_dir)
        kept = {"config": unquantised(self.values)}
        write_atomically(run_dir / KEPT, (json.dumps(kept, indent=2) + "\n").encode())


def read_kept(folder: Path) -> dict[str, Any]:
    """The content of huggingface.json in an Orogen or run folder, {} without the file. Raises ConfigError."""
    return read_json(folder / KEPT, KEPT_FORM) if (folder / KEPT).is_file() else {}


def check_files(folder: Path) -> None:
    """Compares an Orogen folder's files with its checksums, if it has any. Raises ConfigError."""
    if (folder / checksums.NAME).exists():
        checksums.check(folder)


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
