"""The most likely tokens that a teacher predicted, on disk beside the tokens that it read, and read by memory map.

A folder holds `manifest.json`, written last, and arrays of one row per token of the train splits: `ids.npy` (int32) and
`log.npy` (float16, with a relative error of at most 2^-11 from 2^-14 to 65504 in size), both (rows, k), the most likely
first; `starts.npy` (int64) has the first row of each document, source after source. A document's tokens are
those of a training stream, in pieces of the run's sequence length, of which each sees only itself.
Letters: b batch, t time, k most likely tokens, r rows.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import Record, Whole, read_json
from orogen.config.run import RunConfig
from orogen.data.batches import HeldoutPass
from orogen.data.loader import Corpus
from orogen.data.packing import Batch, Stream
from orogen.data.splits import Split
from orogen.parallel.context import zigzag
from orogen.posttrain.teacher import IDS, LOG, Teacher

MANIFEST, PROGRESS, STARTS = "manifest.json", "progress.json", "starts.npy"
FORMAT = "orogen logits 1"
ROW = "row"  # of each token in the arrays, in `Batch.extras`
COUNT = Whole(1, 2**62)
TEXTS = "format", "corpus", "documents", "tokenizer", "teacher"
COUNTS = "sequence_length", "vocab_size", "top_k", "rows"
FORM = Record({**dict.fromkeys(TEXTS, str), **dict.fromkeys(COUNTS, COUNT)}, {})
DTYPES = {"ids": np.int32, "log": np.float16}
FLUSHED = 64  # batches after which what is written so far is kept
BEGUN = Record({"manifest": dict, "sequences": Whole(0, 2**62)}, {})  # progress.json


class Numbered(Sequence[Stream]):
    """The documents of a split, whose tokens have their rows as an extra. starts: the first row of each document."""

    def __init__(self, split: Split, starts: np.ndarray):
        self._split, self._starts = split, starts

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        stream = self._split[int(index)]
        first = int(self._starts[int(index)])
        row_t = np.arange(first, first + len(stream.tokens_t), dtype=np.int64)
        return stream._replace(extras={**stream.extras, ROW: row_t})

    def __getattr__(self, name: str) -> Any:
        """What else a split has: its counts and texts."""
        return getattr(self._split, name)


def numbered(corpus: Corpus, starts: np.ndarray) -> Corpus:
    """The corpus with numbered train splits. starts: of all sources' documents, one source after another."""
    found, first, sources = copy.copy(corpus), 0, {}
    for name, source in corpus.sources.items():
        split = source.splits["train"]
        part = Numbered(split, starts[first : first + len(split)])
        sources[name], first = source._replace(splits={**source.splits, "train": part}), first + len(split)
    found.sources = sources
    if len(sources) == 1:
        found.splits = next(iter(sources.values())).splits
    return found


def write_logits(
    teacher: Teacher, config: RunConfig, corpus: Corpus, out: Path, *, log: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the teacher over every training document and writes what it predicts; returns the manifest.

    Goes on where an earlier call of the same teacher and data was stopped, whatever its batch size. Raises ConfigError
    if `out` exists, if its beginnings are of others, or if the run has sequences of several lengths.
    """
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise ConfigError(f"folder {str(out)!r} exists; expected a new one")
    _require_length(config, config.train.sequence_length, "that of all steps, to write logits for them")
    lengths = [len(split[i].tokens_t) for split in _train(corpus) for i in range(len(split))]
    starts = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]).astype(np.int64)
    top_k = config.need("distill").distill.top_k
    manifest = {
        "format": FORMAT, **_identity(corpus, config), "teacher": teacher.fingerprint, "top_k": top_k,
        "rows": int(sum(lengths)),
    }  # fmt: skip
    arrays, done = _begin(partial, manifest, starts)
    train, sequences, written = config.train, 0, 0
    for source in numbered(corpus, starts).sources.values():
        batches = HeldoutPass(
            streams=source.splits["train"], batch_size=train.batch_size, sequence_length=train.sequence_length,
            pad_id=corpus.tokenizer.pad_id, process_rows=slice(0, train.batch_size),
        )  # fmt: skip
        for batch in batches:
            sequences += int((batch.segments_bt != 0).any(axis=1).sum())
            if sequences <= done:
                continue
            _write(arrays, batch, teacher, contexts=config.plan.context)
            written += 1
            if written % FLUSHED == 0:
                _keep(partial, arrays, manifest, sequences)
                log(f"{sequences} sequences of {train.sequence_length} tokens")
    _keep(partial, arrays, manifest, sequences)
    write_atomically(partial / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    partial.rename(out)
    (out / PROGRESS).unlink()  # last: a call that was stopped just before still has all of it
    return manifest


class StoredLogits:
    """A folder that `write_logits` wrote. Raises ConfigError if it is not whole, or is of other data than the run's."""

    def __init__(self, folder: Path, config: RunConfig, corpus: Corpus):
        if not (folder / MANIFEST).is_file():
            raise ConfigError(f"DistillConfig.logits is {str(folder)!r}; expected a folder of --write_logits")
        self._manifest = read_json(folder / MANIFEST, FORM)
        for name, value in {"format": FORMAT, **_identity(corpus, config)}.items():
            if self._manifest[name] != value:
                found = f"the logits in {str(folder)!r} have {name} = {self._manifest[name]!r}"
                raise ConfigError(f"{found}; expected {value!r}, that of this run")
        _require_length(config, self._manifest["sequence_length"], f"that of the logits in {str(folder)!r}")
        tokens, k = self._manifest["rows"], self._manifest["top_k"]
        self._top_k = config.need("distill").distill.top_k or k
        if self._top_k > k:
            raise ConfigError(f"DistillConfig.top_k is {self._top_k}; expected at most {k}, as many as are stored")
        self._arrays = {name: _mapped(folder / f"{name}.npy", (tokens, k), dtype) for name, dtype in DTYPES.items()}
        documents = sum(len(split) for split in _train(corpus))
        self._starts = _mapped(folder / STARTS, (documents,), np.int64)

    @property
    def teacher(self) -> str:
        """The fingerprint of the teacher that wrote it."""
        return self._manifest["teacher"]

    @property
    def top_k(self) -> int:
        """How many tokens the run reads of those that are stored."""
        return self._top_k

    def numbered(self, corpus: Corpus) -> Corpus:
        """The corpus, whose batches know their rows here."""
        return numbered(corpus, self._starts)

    def add(self, batch: Batch) -> Batch:
        """The batch with what the teacher predicts after each of its tokens."""
        extras = dict(batch.extras)
        row_bt = np.maximum(extras.pop(ROW), 0)
        read = {name: array[row_bt, : self._top_k] for name, array in self._arrays.items()}
        return batch._replace(extras={**extras, IDS: read["ids"], LOG: read["log"].astype(np.float32)})


def _require_length(config: RunConfig, length: int, whose: str) -> None:
    """Raises ConfigError if the run has steps with sequences of another length, whose pieces see other tokens."""
    for one in config.stretches():
        if one.sequence_length != length:
            raise ConfigError(f"a phase has sequence_length = {one.sequence_length}; expected {length}, {whose}")


def _train(corpus: Corpus) -> list[Split]:
    return [source.splits["train"] for source in corpus.sources.values()]


def _identity(corpus: Corpus, config: RunConfig) -> dict[str, Any]:
    """What stored logits and a run must agree on. documents: how they become the train split's token streams."""
    data = config.data
    made = data.seed, data.heldout_fraction, data.tuning_fraction, config.chat
    return {
        "corpus": corpus.content_hash,
        "documents": hashlib.sha256(repr(made).encode()).hexdigest(),
        "tokenizer": corpus.tokenizer.fingerprint,
        "sequence_length": config.train.sequence_length,
        "vocab_size": config.model.vocab_size,
    }


def _begin(partial: Path, manifest: dict[str, Any], starts: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """The arrays to fill, and how many packed sequences of them are written already."""
    shape = manifest["rows"], manifest["top_k"]
    if (partial / PROGRESS).is_file():
        known = read_json(partial / PROGRESS, BEGUN)
        if known["manifest"] != manifest:
            raise ConfigError(f"{str(partial)!r} was begun with another teacher or other data; expected to remove it")
        arrays = {name: _mapped(partial / f"{name}.npy", shape, dtype, "r+") for name, dtype in DTYPES.items()}
        return arrays, known["sequences"]
    partial.mkdir(parents=True, exist_ok=True)
    np.save(partial / STARTS, starts)
    arrays: dict[str, np.ndarray] = {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, dtype in DTYPES.items()
    }
    _keep(partial, arrays, manifest, 0)
    return arrays, 0


def _keep(partial: Path, arrays: dict[str, np.ndarray], manifest: dict[str, Any], sequences: int) -> None:
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    write_atomically(partial / PROGRESS, json.dumps({"manifest": manifest, "sequences": sequences}).encode())


def _write(arrays: dict[str, np.ndarray], batch: Batch, teacher: Teacher, *, contexts: int) -> None:
    """Writes what the teacher predicts after each token of the batch that has a next one."""
    segments_bt = batch.segments_bt
    inside_bt = np.zeros(segments_bt.shape, bool)
    inside_bt[:, :-1] = (segments_bt[:, 1:] == segments_bt[:, :-1]) & (segments_bt[:, :-1] != 0)
    place_t = np.argsort(zigzag(segments_bt.shape[1], contexts))
    found = {name: np.asarray(x)[:, place_t] for name, x in teacher.extras(batch).items()}
    row_r = batch.extras[ROW][inside_bt]
    arrays["ids"][row_r], arrays["log"][row_r] = found[IDS][inside_bt], found[LOG][inside_bt]


def _mapped(file: Path, shape: tuple[int, ...], dtype: Any, mode: Any = "r") -> np.ndarray:
    """Raises ConfigError unless the file holds such an array."""
    try:
        found = np.load(file, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}; expected an array that --write_logits wrote") from None
    if found.shape != shape or found.dtype != dtype:
        expected = f"expected {np.dtype(dtype)} {shape}"
        raise ConfigError(f"{file} holds {found.dtype} {found.shape}; {expected}")
    return found
