"""An open corpus, and its batches: shuffled, packed, sharded over processes, resumable.

Legend: b batch (rows), t time.
"""

import copy
import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data import corpora, sources
from orogen.data.lanes import LaneRows
from orogen.data.packing import Batch, Stream, document_stream, empty_batch
from orogen.data.sources import Document
from orogen.data.tokenizer import Tokenizer, check_vocab_size
from orogen.data.vocabulary import make_tokenizer
from orogen.data.windows import WINDOW_TOKENS, PackedRows, stack


class TokenizedSplit(Sequence[Stream]):
    """A split as token streams [bos, document, eos]; each document is tokenised on first access, then kept."""

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
        self.documents = documents
        self._tokenizer = tokenizer
        self._ids: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        index = int(index)
        if index not in self._ids:
            self._ids[index] = self._encode(self.documents[index])
        return document_stream(self._ids[index], bos_id=self._tokenizer.bos_id, eos_id=self._tokenizer.eos_id)

    def _encode(self, document: Document) -> np.ndarray:
        """Ids that stand for exactly the document's bytes. Raises ConfigError that names the document if there are
        none."""
        try:
            return self._tokenizer.encode_document(document.text)
        except ConfigError as error:
            raise ConfigError(f"document {document.key}: {error}") from error

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(len(document.text.encode()) for document in self.documents)


class Corpus:
    """Documents by split, their tokenizer and their hash. Text and tokens stay in memory."""

    def __init__(
        self, *, config: DataConfig, documents: dict[str, list[Document]], tokenizer: Tokenizer, content_hash: str
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.content_hash = content_hash
        self.splits = {name: TokenizedSplit(documents[name], tokenizer) for name in corpora.SPLITS}

    def describe(self) -> dict[str, Any]:
        """What a run should record of its data: hash, vocabulary, documents and bytes by split, skipped files."""
        embedded = self.config.corpus == "stdlib"
        return {
            "corpus": self.config.corpus,
            "content_hash": self.content_hash,
            "tokenizer_hash": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "documents": {name: len(split) for name, split in self.splits.items()},
            "bytes": {name: split.byte_count for name, split in self.splits.items()},
            "unread_files": 0 if embedded else sources.unread_files(self.config.corpus),
            "linked_folders": 0 if embedded else sources.linked_folders(self.config.corpus),
        }

    def train_loader(
        self,
        *,
        batch_size: int,
        sequence_length: int,
        process_index: int = 0,
        process_count: int = 1,
        shuffle_seed: int | None = None,
        lanes: bool = False,
    ) -> "Loader":
        """Endless batches of the train split, (batch_size / process_count, sequence_length) for this process.

        `shuffle_seed` orders the documents and rows, `DataConfig.seed` if None. lanes: see `make_loader`. Raises
        ConfigError as it does.
        """
        return make_loader(
            self.splits["train"],
            batch_size=batch_size,
            sequence_length=sequence_length,
            pad_id=self.tokenizer.pad_id,
            shuffle_seed=(self.config.seed if shuffle_seed is None else shuffle_seed) if self.config.shuffle else None,
            process_index=process_index,
            process_count=process_count,
            lanes=lanes,
            identity={"corpus": self.content_hash, "tokenizer": self.tokenizer.fingerprint, "seed": self.config.seed},
        )

    def heldout_batches(
        self, split: str, *, batch_size: int, sequence_length: int, process_index: int = 0, process_count: int = 1
    ) -> "HeldoutPass":
        """One pass over a split ("heldout", "tuning" or "train"), in order. Raises ConfigError if it is empty."""
        if split not in self.splits or not len(self.splits[split]):
            present = [name for name, documents in self.splits.items() if len(documents)]
            raise ConfigError(f"split {split!r} has no document: expected one of {present}")
        return HeldoutPass(
            streams=self.splits[split],
            batch_size=batch_size,
            sequence_length=sequence_length,
            pad_id=self.tokenizer.pad_id,
            process_rows=_process_rows(batch_size, sequence_length, process_index, process_count),
        )


def open_corpus(config: DataConfig, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads the corpus, splits it, and trains or loads its tokenizer; a resumed run passes the one it saved.

    Raises FileNotFoundError or ValueError for files that cannot be read, an empty split, a vocabulary larger than the
    text allows, or a tokenizer that does not keep every byte.
    """
    documents = corpora.corpus_documents(config)
    by_split = corpora.split_documents(documents, config=config)
    if tokenizer is None:
        tokenizer = make_tokenizer(config, (document.text for document in by_split["train"]))
    elif config.vocab_size is not None:
        check_vocab_size(tokenizer, config.vocab_size, name="DataConfig.vocab_size")
    tokenizer.check_lossless()
    return Corpus(config=config, documents=by_split, tokenizer=tokenizer, content_hash=corpora.content_hash(documents))


class Loader:
    """An iterator over batches whose position can be saved and restored to the bit."""

    def __init__(self, batches: grain.IterDataset, *, identity: dict[str, Any]) -> None:
        self._identity = identity
        # Kept so that the finalizer can drop it, at exit too: a prefetching iterator of grain 0.2.18 that outlives the
        # interpreter's modules prints a traceback.
        self._held = [iter(batches)]
        weakref.finalize(self, self._held.clear)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._held[0])

    def take(self, state: Any) -> Batch:
        """The next batch: text does not depend on the model's `state`."""
        return next(self)

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken, as plain JSON; the same on every process."""
        return {"position": copy.deepcopy(self._held[0].get_state()), "identity": dict(self._identity)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken. Raises ConfigError if it is from other data."""
        for field in ("position", "identity"):
            if not isinstance(state.get(field), dict):
                raise ConfigError(f"the saved data position has no object {field!r}; expected one")
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                raise ConfigError(
                    f"the saved data position has {name} = {state['identity'].get(name)!r}: expected {value!r}, "
                    "or the batches after it would not be those of the saved run"
                )
        if not _alike(state["position"], self._held[0].get_state()):
            raise ConfigError(f"the saved data position is {state['position']!r}; expected one of this corpus's loader")
        self._held[0].set_state(copy.deepcopy(state["position"]))


def _alike(position: Any, known: Any) -> bool:
    """Whether a position has the keys of `known`, an iterator's own, and whole numbers from 0 in the same places."""
    if isinstance(known, dict):
        keys = isinstance(position, dict) and position.keys() == known.keys()
        return keys and all(_alike(position[key], value) for key, value in known.items())
    return type(position) is type(known) and (type(known) is not int or 0 <= position < 2**63)


def make_loader(
    streams: Sequence[Stream],
    *,
    batch_size: int,
    sequence_length: int,
    pad_id: int,
    shuffle_seed: int | None,
    process_index: int = 0,
    process_count: int = 1,
    identity: dict[str, Any] | None = None,
    window_tokens: int = WINDOW_TOKENS,
    lanes: bool = False,
) -> Loader:
    """Endless batches of the streams, each epoch in a new order; `shuffle_seed` None keeps their order.

    Rows are packed, or, with `lanes`, each continues the same row of the previous batch: see `LaneRows`.
    Every process packs the same global batches and keeps its own rows, so that neither the data nor a saved
    position depends on the number of processes. `identity` is what a saved position must agree on.
    Raises ConfigError if there is no stream, a row has no room for a target, or processes cannot share a batch evenly.
    """
    if not len(streams):
        raise ConfigError("streams is empty: expected at least one document")
    process_rows = _process_rows(batch_size, sequence_length, process_index, process_count)
    documents = grain.MapDataset.source(streams)
    if shuffle_seed is not None:
        documents = documents.shuffle(_spread(shuffle_seed))
    settings = {"batch_size": batch_size, "sequence_length": sequence_length, "shuffle_seed": shuffle_seed}
    if lanes:
        if len(streams) < batch_size:
            expected = f"at most {len(streams)}, the number of documents: each row reads its own, and continues it"
            raise ConfigError(f"batch_size = {batch_size}: expected {expected}")
        settings["lanes"] = True
        batches = LaneRows(documents.repeat(), lanes=batch_size, sequence_length=sequence_length)
    else:
        rows = PackedRows(
            documents.repeat(), sequence_length=sequence_length, pad_id=pad_id, shuffle_seed=shuffle_seed,
            window_tokens=window_tokens, window_documents=len(streams),
        )  # fmt: skip
        batches = rows.batch(batch_size, drop_remainder=True, batch_fn=stack)
    return Loader(
        grain.experimental.ThreadPrefetchIterDataset(batches.map(_rows_taker(process_rows)), prefetch_buffer_size=2),
        identity={**(identity or {}), **settings},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutPass:
    """One unshuffled pass over documents; each `iter` starts it anew. The last batch is padded with empty rows.

    bits per byte = sum of nats / ln 2 / `byte_count`. Predicting eos costs nats and adds no byte, so a model pays
    for knowing where a document ends; `byte_count` is of the whole pass, over all processes.
    """

    streams: TokenizedSplit
    batch_size: int
    sequence_length: int
    pad_id: int
    process_rows: slice

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of all documents of the pass."""
        return self.streams.byte_count

    def __iter__(self) -> Iterator[Batch]:
        rows = PackedRows(
            grain.MapDataset.source(self.streams),
            sequence_length=self.sequence_length,
            pad_id=self.pad_id,
            shuffle_seed=None,
            window_tokens=WINDOW_TOKENS,
            window_documents=len(self.streams),
        )
        take = _rows_taker(self.process_rows)
        for batch in rows.batch(self.batch_size, drop_remainder=False, batch_fn=stack):
            missing = self.batch_size - len(batch.tokens_bt)
            padding = empty_batch(missing, sequence_length=self.sequence_length, pad_id=self.pad_id)
            yield take(batch.map(lambda *parts: np.concatenate(parts), padding))


def _rows_taker(rows: slice) -> Callable[[Batch], Batch]:
    return lambda batch: batch.map(lambda x_bt: x_bt[rows])


def _process_rows(batch_size: int, sequence_length: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to one process. Raises ConfigError for an impossible shape."""
    if sequence_length < 2:
        raise ConfigError(f"sequence_length = {sequence_length}: expected at least 2, a token and its target")
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: expected at least 1")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index = {process_index}: expected 0 to process_count - 1 = {process_count - 1}")
    if batch_size % process_count:
        raise ConfigError(f"batch_size = {batch_size}: expected a multiple of process_count = {process_count}")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _spread(seed: int) -> int:
    """A seed far from its neighbours: grain's epoch e uses seed + e, so seed 0's epoch 1 would be seed 1's epoch 0."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
