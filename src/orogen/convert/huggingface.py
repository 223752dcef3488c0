"""Hugging Face folders and Orogen checkpoint folders, one into the other, a tensor at a time.

An Orogen checkpoint folder holds config.gin, the parameters in safetensors files under our names, tokenizer/, and
huggingface.json: what the Hugging Face folder said that a ModelConfig does not.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import ListOf, MapOf, Record, read_json
from orogen.config.load import load_saved, model_text
from orogen.config.model import ModelConfig
from orogen.convert import names
from orogen.convert.config import family_of, mtp_blocks, read_config, write_config
from orogen.convert.tensor_files import DTYPES, Spec, TensorReader, TensorWriter, check_fits, new_folder
from orogen.data.tokenizer import Tokenizer
from orogen.train import checksums
from orogen.train.streams import say

CONFIG, KEPT, GENERATION = "config.gin", "huggingface.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TORCH_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
KEPT_FORM = Record({}, {"config": dict, "dtypes": MapOf(str), "copies": ListOf(str)})

THREADS = 2  # and as many tensors in memory

Read = Callable[[names.Path, tuple[int, ...]], np.ndarray]
Fits = Callable[[str, int], None]  # of the largest tensor's name and the bytes of memory that it takes


class HuggingFaceFolder:
    """The tensors of a Hugging Face folder, checked against the table of its family. Use as a context manager.

    Raises ConfigError with every tensor that is missing, surplus, of another shape, or an unequal copy.
    """

    def __init__(self, folder: Path):
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
        """The model with a head of its own where the family's class has one in spite of tie_word_embeddings."""
        family, (head, embedding) = names.FAMILIES[self.family], names.head_and_embedding(self.family)
        both = head in self.stored and embedding in self.stored
        if family.ties or not config.tie_word_embeddings or not both:
            return config
        if self.reader.equal(self.stored[head], self.stored[embedding]):
            return config
        return dataclasses.replace(config, tie_word_embeddings=False)

    def __enter__(self) -> "HuggingFaceFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.reader.__exit__(*exception)

    def read(self, name: str) -> np.ndarray:
        """A tensor, by its name in the table."""
        return self.reader.read(self.stored[name])

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype in the file."""
        return self.reader.specs[self.stored[name]].dtype

    def parameters(self) -> dict[names.Path, Spec]:
        """Shape and dtype of every parameter: the narrowest that holds all its pieces."""
        dtypes: dict[names.Path, np.dtype] = {}
        for name, tensor in self.table.items():
            for piece in tensor.pieces:
                dtypes[piece.path] = _promoted([self.dtype(name), *filter(None, [dtypes.get(piece.path)])])
        return {path: Spec(shape, dtypes[path]) for path, shape in names.leaf_shapes(self.table).items()}

    def parameter(self, path: names.Path, spec: Spec) -> np.ndarray:
        """A parameter, put together from its pieces."""
        array = np.empty(spec.shape, spec.dtype)
        for name, piece in self._pieces()[path]:
            array[piece.index] = piece.take(self.read(name))
        return array

    def _pieces(self) -> dict[names.Path, list[tuple[str, names.Piece]]]:
        if not hasattr(self, "_by_path"):
            self._by_path: dict[names.Path, list[tuple[str, names.Piece]]] = {}
            for name, tensor in self.table.items():
                for piece in tensor.pieces:
                    self._by_path.setdefault(piece.path, []).append((name, piece))
        return self._by_path


class OrogenFolder:
    """The parameters of an Orogen checkpoint folder. Use as a context manager.

    Raises ConfigError, naming the file, if one is not as the folder's checksums have it; earlier releases wrote none.
    """

    def __init__(self, folder: Path):
        if (folder / checksums.NAME).exists():
            checksums.check(folder)
        self.config = model_config(folder)
        self.reader = TensorReader(folder)
        self.specs = {tuple(_key(part) for part in name.split(".")): s for name, s in self.reader.specs.items()}

    def __enter__(self) -> "OrogenFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.reader.__exit__(*exception)

    def parameters(self) -> dict[names.Path, Spec]:
        """Shape and dtype of every parameter."""
        return self.specs

    def parameter(self, path: names.Path, spec: Spec) -> np.ndarray:
        """A parameter."""
        return self.reader.read(dotted(path))


def from_hf(source: Path, target: Path, *, fits: Fits = lambda tensor, held: None) -> None:
    """Makes the Orogen checkpoint folder `target` of a Hugging Face folder, in the dtypes that its files have.

    Holds THREADS tensors in memory at a time. fits: raises ConfigError for what memory cannot hold. Raises ConfigError
    before anything is written; what is interrupted leaves no `target`. Its files get checksums, as a run's do.
    """
    with HuggingFaceFolder(source) as folder:
        fits(*max(((name, spec.nbytes) for name, spec in folder.reader.specs.items()), key=lambda item: item[1]))
        specs = folder.parameters()
        expected = _tensor_dtypes(folder.table, {path: spec.dtype for path, spec in specs.items()})
        others = {n: folder.dtype(n).name for n in folder.stored if folder.dtype(n) != expected[n]}
        kept = {"config": folder.values, "dtypes": others, "copies": folder.copies}
        with new_folder(target) as scratch:
            with TensorWriter(scratch, {dotted(path): spec for path, spec in specs.items()}) as writer:

                def write(name: str) -> None:
                    array = folder.read(name)
                    for piece in folder.table[name].pieces:
                        writer.write(dotted(piece.path), piece.take(array), piece.index)

                _for_each(write, [name for name, tensor in folder.table.items() if tensor.pieces])
            copy_tokenizer(source, scratch / "tokenizer")
            _copy([GENERATION], source, scratch)
            write_atomically(scratch / KEPT, (json.dumps(kept, indent=2) + "\n").encode())
            write_atomically(scratch / CONFIG, model_text(folder.config).encode())
            checksums.write(scratch)


def to_hf(
    config: ModelConfig,
    specs: Mapping[names.Path, Spec],
    read: Read,
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    context: int | None = None,
    fits: Fits = lambda tensor, held: None,
) -> None:
    """Makes the Hugging Face folder `target` of parameters; the inverse of `from_hf` if `dtype` is None.

    specs, read: the parameters, by path and index in their leading axes. source: the folder that has the tokenizer and
    huggingface.json, if there is one. dtype: of every tensor but the routers' correction biases, which stay float32;
    None: as the parameters have it. context: tokens of a row in training, if that is known. fits: as `from_hf`'s.
    Lines on stderr name what transformers makes otherwise. Raises ConfigError, also for a number that is too large for
    its tensor's dtype, and leaves no `target` then.
    """
    kept = read_json(source / KEPT, KEPT_FORM) if (source / KEPT).is_file() else {}
    values: dict[str, Any] = kept.get("config", {})
    family = values.get("model_type") or family_of(config)
    written = write_config(family, config, values or None, context=context)
    table = names.table(family, config, mtp_blocks=mtp_blocks(written))
    wanted = names.leaf_shapes(table)
    check_shapes(source, {dotted(p): s.shape for p, s in specs.items()}, {dotted(p): s for p, s in wanted.items()})
    copies = kept.get("copies", [n for n, t in table.items() if t.optional and t.written])
    if not names.FAMILIES[family].ties:  # its class would draw at random a head that the files lack
        copies = [*copies, names.HEAD]
    table = {n: t for n, t in table.items() if not t.optional or n in copies}
    dtypes = _target_dtypes(table, {path: spec.dtype for path, spec in specs.items()}, dtype, kept.get("dtypes", {}))
    fits(*max(((n, math.prod(t.shape) * dtypes[n].itemsize) for n, t in table.items()), key=lambda item: item[1]))
    written = _with_dtype(written, values, dtypes.values())
    if not values:
        written = {**written, **_special_ids(source / "tokenizer")}
    with new_folder(target) as scratch:
        with TensorWriter(scratch, {name: Spec(t.shape, dtypes[name]) for name, t in table.items()}) as writer:
            for name, tensor in table.items():  # not by threads: a tensor is in memory twice here
                array = np.empty(tensor.shape, dtypes[name])
                for piece in table[tensor.copy_of].pieces if tensor.copy_of else tensor.pieces:
                    part = read(piece.path, piece.index)
                    check_fits(name, part, array.dtype)
                    piece.put(array, part)
                writer.write(name, array)
        copy_tokenizer(source / "tokenizer", scratch)
        _copy([GENERATION], source, scratch)
        write_atomically(scratch / "config.json", (json.dumps(written, indent=2) + "\n").encode())
    for remark in names.remarks(family, config, mtp_blocks=mtp_blocks(written)):
        say(f"{target}: {remark}")


def _for_each(work: Callable[[str], None], tensors: list[str]) -> None:
    """`work` on every tensor's name. While one thread turns a tensor round, which lets go of Python's lock, another
    reads or writes."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(work, tensors):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def context_length(run_dir: Path) -> int:
    """How many tokens the rows of a run have. Raises ConfigError."""
    config = load_saved(run_dir / CONFIG)
    return config.need("train").train.sequence_length


def model_config(folder: Path) -> ModelConfig:
    """The model of an Orogen checkpoint folder, or of a run folder. Raises ConfigError."""
    try:
        config = load_saved(folder / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    return config.need("model").model


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files that are there."""
    _copy(TOKENIZER_FILES, source, target)


def copy_kept(source: Path, run_dir: Path) -> None:
    """Gives a run what it takes to become a Hugging Face folder like the one that its weights came from."""
    _copy([GENERATION, KEPT], source, run_dir)
    if (source / "config.json").is_file():
        kept = {"config": read_json(source / "config.json")}
        write_atomically(run_dir / KEPT, (json.dumps(kept, indent=2) + "\n").encode())


def dotted(path: Iterable[str | int]) -> str:
    """A parameter's name in files: `backbone.children.0.mixer.x`."""
    return ".".join(map(str, path))


def _key(part: str) -> str | int:
    return int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else part


def _copy(files: Iterable[str], source: Path, target: Path) -> None:
    for file in files:
        if (source / file).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / file, target / file)


def check_shapes(
    folder: Path,
    have: Mapping[str, tuple[int, ...]],
    want: Mapping[str, tuple[int, ...]],
    optional: Iterable[str] = (),
) -> None:
    """Raises ConfigError with every name that is missing, surplus or of another shape."""
    faults = [f"{name} is missing" for name in sorted(want.keys() - have.keys() - set(optional))]
    faults += [f"{name} is surplus" for name in sorted(have.keys() - want.keys())]
    both = sorted(name for name in want.keys() & have.keys() if want[name] != have[name])
    faults += [f"{name} is {list(have[name])}, expected {list(want[name])}" for name in both]
    if faults:
        raise ConfigError(f"{folder} does not hold the model of its config: {'; '.join(faults)}")


def _promoted(dtypes: Iterable[np.dtype]) -> np.dtype:
    first, *rest = set(dtypes)
    for dtype in rest:
        first = np.dtype(jnp.promote_types(first, dtype))
    return first


def _tensor_dtypes(table: names.Table, leaves: Mapping[names.Path, np.dtype]) -> dict[str, np.dtype]:
    """The dtype of each tensor as its pieces have it; copies are as what they repeat, those of no numbers as the first
    tensor."""
    found = {n: _promoted(leaves[p.path] for p in t.pieces) for n, t in table.items() if t.pieces}
    first = next(iter(found.values()))
    return found | {n: found.get(t.copy_of or "", first) for n, t in table.items() if t.optional}


def _target_dtypes(
    table: names.Table, leaves: Mapping[names.Path, np.dtype], dtype: str | None, others: Mapping[str, str]
) -> dict[str, np.dtype]:
    if dtype is not None:
        asked, wide = DTYPES[TORCH_DTYPES[dtype]], np.dtype(np.float32)
        return {name: wide if tensor.float32 else asked for name, tensor in table.items()}
    found = _tensor_dtypes(table, leaves)
    return found | {name: np.dtype(jnp.dtype(kind)) for name, kind in others.items() if name in found}


def _with_dtype(written: dict[str, Any], before: dict[str, Any], dtypes: Iterable[np.dtype]) -> dict[str, Any]:
    """The config with the dtype that most tensors have, under the name it has there; unchanged if it says so."""
    counts: dict[str, int] = {}
    for dtype in dtypes:
        counts[dtype.name] = counts.get(dtype.name, 0) + 1
    common = max(counts, key=lambda name: counts[name])
    key = next((key for key in ("dtype", "torch_dtype") if key in before), "dtype")
    return written if before and written.get(key, common) == common else {**written, key: common}


def _special_ids(folder: Path) -> dict[str, int]:
    if not (folder / "tokenizer.json").is_file():
        return {}
    tokenizer = Tokenizer.load(folder)
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "bos", "eos")}
