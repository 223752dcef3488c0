"""Converts Orogen checkpoint folders and runs to Hugging Face folders, and back, one tensor at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

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
    read_kept,
)
from orogen.checkpoint.leaves import check_shapes, dotted, leaves_of
from orogen.checkpoint.open import open_folder, read_model
from orogen.checkpoint.tensors import HuggingFaceTensors, promoted, unquantised
from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import read_json
from orogen.config.model import ModelConfig
from orogen.config.streams import say
from orogen.config.text import model_text
from orogen.convert import names
from orogen.convert.config import family_of, mtp_blocks, write_config
from orogen.convert.quantization import FILE as QUANTIZATION
from orogen.convert.tensor_files import Spec, TensorWriter, check_fits, new_folder
from orogen.data.tokenizer import Tokenizer

THREADS = 2  # as many tensors are in memory at a time

Read = Callable[[names.Path, tuple[int, ...]], np.ndarray]
# (name of the largest tensor, its bytes); raises ConfigError if memory cannot hold it.
Fits = Callable[[str, int], None]


def from_hf(source: Path, target: Path, *, fits: Fits = lambda tensor, held: None) -> None:
    """Converts a Hugging Face folder into the Orogen checkpoint folder `target`, in the dtypes of its files.

    Holds THREADS tensors in memory at a time. fits: see Fits. Raises ConfigError before anything is written; an
    interrupted conversion leaves no `target`. The files get checksums, as a run's do.
    """
    with HuggingFaceFolder(source) as folder:
        tensors = folder.tensors
        _require_largest_fits(tensors.reader.specs, fits)
        with new_folder(target) as scratch:
            kept = _copy_stored(tensors, scratch) if tensors.quantization else _write_parameters(tensors, scratch)
            copy_files(TOKENIZER_FILES, source, scratch / "tokenizer")
            copy_files([GENERATION, QUANTIZATION], source, scratch)
            write_atomically(scratch / KEPT, (json.dumps({"config": folder.values} | kept, indent=2) + "\n").encode())
            write_atomically(scratch / CONFIG, model_text(folder.config).encode())
            checksums.write(scratch)


def _require_largest_fits(specs: Mapping[str, Spec], fits: Fits) -> None:
    largest = max(specs, key=lambda name: specs[name].nbytes)
    fits(largest, specs[largest].nbytes)


def _write_parameters(tensors: HuggingFaceTensors, target: Path) -> dict[str, Any]:
    """Writes the parameters under our names; returns what else an export to Hugging Face will need."""
    specs = tensors.parameters()
    expected = _tensor_dtypes(tensors.table, {path: spec.dtype for path, spec in specs.items()})
    others = {n: tensors.dtype(n).name for n in tensors.stored if tensors.dtype(n) != expected[n]}
    with TensorWriter(target, {dotted(path): spec for path, spec in specs.items()}) as writer:

        def write(name: str) -> None:
            array = tensors.tensor(name)
            for piece in tensors.table[name].pieces:
                writer.write(dotted(piece.path), piece.take(array), piece.index)

        _for_each(write, [name for name, tensor in tensors.table.items() if tensor.pieces])
    return {"dtypes": others, "copies": tensors.copies}


def _copy_stored(tensors: HuggingFaceTensors, target: Path) -> dict[str, Any]:
    """Writes the tensors of a quantised folder as they are stored."""
    specs = tensors.reader.specs
    with TensorWriter(target, specs) as writer:
        _for_each(lambda name: writer.write(name, tensors.reader.read(name)), list(specs))
    return {"tensors": AS_STORED}


class Layout(NamedTuple):
    """A Hugging Face checkpoint to be written: its model_type, its config.json, the table of its tensors, their shapes
    and dtypes, and the function that reads the parameters."""

    family: str
    values: dict[str, Any]
    table: names.Table
    specs: dict[str, Spec]
    read: Read

    def tensor(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """A tensor, assembled. Raises ConfigError for a number too large for its dtype."""
        tensor, array = self.table[name], np.empty(self.specs[name].shape, dtype or self.specs[name].dtype)
        for piece in self.table[tensor.copy_of].pieces if tensor.copy_of else tensor.pieces:
            part = self.read(piece.path, piece.index)
            check_fits(name, part, array.dtype)
            piece.put(array, part)
        return array


def layout_of(
    config: ModelConfig,
    specs: Mapping[names.Path, Spec],
    read: Read,
    source: Path,
    *,
    dtype: str | None = None,
    context: int | None = None,
) -> Layout:
    """The Hugging Face checkpoint of a model; arguments as in `to_hf`."""
    kept = _kept(source)
    values: dict[str, Any] = unquantised(kept.get("config", {}))
    family = values.get("model_type") or family_of(config)
    written = write_config(family, config, values or None, context=context)
    table = names.table(family, config, mtp_blocks=mtp_blocks(written))
    wanted = names.leaf_shapes(table)
    check_shapes(source, {dotted(p): s.shape for p, s in specs.items()}, {dotted(p): s for p, s in wanted.items()})
    copies = kept.get("copies", [n for n, t in table.items() if t.optional and t.written])
    if not names.FAMILIES[family].ties:  # its class would initialise a missing head at random
        copies = [*copies, names.HEAD]
    table = {n: t for n, t in table.items() if not t.optional or n in copies}
    dtypes = _target_dtypes(table, {path: spec.dtype for path, spec in specs.items()}, dtype, kept.get("dtypes", {}))
    written = _with_dtype(written, values, dtypes.values())
    if not values:
        written = {**written, **_special_ids(source / "tokenizer")}
    return Layout(family, written, table, {name: Spec(t.shape, dtypes[name]) for name, t in table.items()}, read)


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
    """Writes parameters into the Hugging Face folder `target`; the inverse of `from_hf` if `dtype` is None.

    specs, read: the parameters, by path and index in their leading axes. source: the folder with the tokenizer and
    huggingface.json, if it has them. dtype: of every tensor except the routers' correction biases, which stay float32;
    None: those of the parameters. context: tokens per sequence in training, if known. fits: see Fits. Lines on stderr
    name what transformers computes differently. Raises ConfigError, also for a number too large for its tensor's dtype,
    and then leaves no `target`.
    """
    layout = layout_of(config, specs, read, source, dtype=dtype, context=context)
    _require_largest_fits(layout.specs, fits)
    with new_folder(target) as scratch:
        with TensorWriter(scratch, layout.specs) as writer:
            for name in layout.table:  # without threads: a tensor is in memory twice here
                writer.write(name, layout.tensor(name))
        copy_files(TOKENIZER_FILES, source / "tokenizer", scratch)
        copy_files([GENERATION], source, scratch)
        write_atomically(scratch / "config.json", (json.dumps(layout.values, indent=2) + "\n").encode())
    for remark in names.remarks(layout.family, config, mtp_blocks=mtp_blocks(layout.values)):
        say(f"{target}: {remark}")


def _kept(source: Path) -> dict[str, Any]:
    """The content of huggingface.json; if `source` is a Hugging Face folder itself, its config."""
    if (source / CONFIG).is_file() or not (source / "config.json").is_file():
        return read_kept(source)
    return {"config": read_json(source / "config.json")}


def export(source: Path, target: Path, *, dtype: str | None = None, fits: Fits = lambda tensor, held: None) -> None:
    """`to_hf` of a run folder or an Orogen checkpoint folder.

    dtype: None keeps the dtypes of an Orogen checkpoint folder, quantised tensors included, and writes a run's float32
    masters as bfloat16. With a dtype, quantised tensors are decoded.
    """
    with open_folder(source) as folder:
        if isinstance(folder, HuggingFaceFolder):
            if not folder.stored:
                expected = "expected a run or an Orogen checkpoint folder"
                raise ConfigError(f"{str(source)!r} is a Hugging Face folder; {expected}")
            if dtype is None:
                _export_stored(folder, target, fits)
                return
        context = folder.row_length if isinstance(folder, RunFolder) else None
        specs, read = folder_tensors(folder)
        dtype = dtype or ("bfloat16" if folder.masters else None)
        to_hf(folder.config, specs, read, source, target, dtype=dtype, context=context, fits=fits)


def _export_stored(folder: HuggingFaceFolder, target: Path, fits: Fits) -> None:
    """Writes the tensors of a quantised Orogen folder into a Hugging Face folder, unchanged."""
    tensors, source = folder.tensors, folder.folder
    _require_largest_fits(tensors.reader.specs, fits)
    with new_folder(target) as scratch:
        _copy_stored(tensors, scratch)
        copy_files(TOKENIZER_FILES, source / "tokenizer", scratch)
        copy_files([GENERATION, QUANTIZATION], source, scratch)
        write_atomically(scratch / "config.json", (json.dumps(folder.values, indent=2) + "\n").encode())


def folder_tensors(folder: RunFolder | OrogenFolder | HuggingFaceFolder) -> tuple[Mapping[names.Path, Spec], Read]:
    """The parameters of a folder, as `to_hf` takes them. Those of a run are read into memory at once, those of other
    folders on demand."""
    if isinstance(folder, RunFolder):
        opened = read_model(folder, tokenizer=False)
        return model_tensors(opened.params, opened.buffers)
    return folder.parameters(), folder.piece


def model_tensors(params: nnx.State, buffers: nnx.State) -> tuple[dict[names.Path, Spec], Read]:
    """The parameters of a model in memory, as `to_hf` takes them."""
    leaves = {path: leaf.get_value() for path, leaf in leaves_of(params, buffers).items()}
    specs = {path: Spec(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    return specs, lambda path, index: np.asarray(leaves[path])[index]


def _for_each(work: Callable[[str], None], tensors: list[str]) -> None:
    """Calls `work` with every tensor's name. While one thread transposes a tensor, which releases the GIL, another
    reads or writes."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(work, tensors):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _tensor_dtypes(table: names.Table, leaves: Mapping[names.Path, np.dtype]) -> dict[str, np.dtype]:
    """The dtype of each tensor: the narrowest that holds its pieces. A copy has that of its original; an optional
    tensor without numbers has that of the first tensor."""
    found = {n: promoted(leaves[p.path] for p in t.pieces) for n, t in table.items() if t.pieces}
    first = next(iter(found.values()))
    return found | {n: found.get(t.copy_of or "", first) for n, t in table.items() if t.optional}


def _target_dtypes(
    table: names.Table, leaves: Mapping[names.Path, np.dtype], dtype: str | None, others: Mapping[str, str]
) -> dict[str, np.dtype]:
    if dtype is not None:
        asked, wide = jnp.dtype(dtype), np.dtype(np.float32)
        return {name: wide if tensor.float32 else asked for name, tensor in table.items()}
    found = _tensor_dtypes(table, leaves)
    return found | {name: np.dtype(jnp.dtype(kind)) for name, kind in others.items() if name in found}


def _with_dtype(written: dict[str, Any], before: dict[str, Any], dtypes: Iterable[np.dtype]) -> dict[str, Any]:
    """The config with the dtype of most tensors, under the key that the config before had; unchanged if it agrees."""
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
