"""An open corpus: its documents by source and split, their tokenizer, and their batches."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.phases import Stretch
from orogen.data import corpora, sources
from orogen.data.batches import HeldoutPass, Loader, make_blend, make_loader, rows_of_process
from orogen.data.splits import JoinedSplit, Split, TokenizedSplit
from orogen.data.store import Store, is_store
from orogen.data.tokenizer import Tokenizer, check_vocab_size
from orogen.data.vocabulary import make_tokenizer

ONLY = "corpus"  # the name of the source of a run without DataConfig.sources


class Source(NamedTuple):
    """One source of a corpus. splits: by name; files: the corpus whose files were read, None for a store."""

    content_hash: str
    splits: Mapping[str, Split]
    files: str | None


class Corpus:
    """Documents by source and split, and their tokenizer. Text and tokens stay in memory, except those of stores.

    splits: the documents of all sources, by split; content_hash: of all sources.
    """

    def __init__(self, *, config: DataConfig, sources: Mapping[str, Source], tokenizer: Tokenizer) -> None:
        self.config, self.sources, self.tokenizer = config, sources, tokenizer
        if len(sources) == 1:
            (only,) = sources.values()
            self.content_hash, self.splits = only.content_hash, only.splits
        else:
            text = "\n".join(f"{name} {source.content_hash}" for name, source in sources.items())
            self.content_hash = hashlib.sha256(text.encode()).hexdigest()
            self.splits = {
                name: JoinedSplit([source.splits[name] for source in sources.values()]) for name in corpora.SPLITS
            }

    def describe(self) -> dict[str, Any]:
        """What a run should record of its data: hash, vocabulary, documents and bytes by split, skipped files; with
        several sources, also of each."""
        skipped = [_skipped(source.files) for source in self.sources.values()]
        facts = {
            "corpus": self.config.corpus,
            "content_hash": self.content_hash,
            "tokenizer_hash": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            **_sizes(self.splits),
            **{name: sum(one[name] for one in skipped) for name in ("unread_files", "linked_folders")},
        }
        if self.config.sources:
            facts["sources"] = {
                one.name: {
                    "corpus": one.corpus,
                    "content_hash": self.sources[one.name].content_hash,
                    **_sizes(self.sources[one.name].splits),
                }
                for one in self.config.sources
            }
        return facts

    def train_loader(
        self,
        *,
        batch_size: int,
        sequence_length: int,
        process_index: int = 0,
        process_count: int = 1,
        shuffle_seed: int | None = None,
        lanes: bool = False,
    ) -> Loader:
        """Endless batches of the train split, (batch_size / process_count, sequence_length) for this process.

        `shuffle_seed` orders the documents and rows, `DataConfig.seed` if None. lanes: see `make_loader`. Raises
        ConfigError as it does.
        """
        return make_loader(
            self.splits["train"],
            batch_size=batch_size,
            sequence_length=sequence_length,
            pad_id=self.tokenizer.pad_id,
            shuffle_seed=self._seed(shuffle_seed),
            process_index=process_index,
            process_count=process_count,
            lanes=lanes,
            identity=self._identity,
        )

    def blend_loader(
        self,
        stretches: Sequence[Stretch],
        *,
        process_index: int = 0,
        process_count: int = 1,
        shuffle_seed: int | None = None,
    ) -> Loader:
        """`train_loader` for a run of several sources, or of shapes that change. Raises ConfigError as `make_blend`
        does."""
        return make_blend(
            {name: source.splits["train"] for name, source in self.sources.items()},
            [one if one.weights else one._replace(weights={ONLY: 1.0}) for one in stretches],
            pad_id=self.tokenizer.pad_id,
            shuffle_seed=self._seed(shuffle_seed),
            max_epochs={one.name: one.max_epochs for one in self.config.sources},
            process_index=process_index,
            process_count=process_count,
            identity=self._identity,
        )

    def heldout_batches(
        self,
        split: str,
        *,
        batch_size: int,
        sequence_length: int,
        process_index: int = 0,
        process_count: int = 1,
        source: str | None = None,
    ) -> HeldoutPass:
        """One pass over a split ("heldout", "tuning" or "train"), in order. source: its name; None: all of them. Raises
        ConfigError if it is empty."""
        splits = self.splits if source is None else self.sources[source].splits
        if split not in splits or not len(splits[split]):
            present = [name for name, documents in splits.items() if len(documents)]
            raise ConfigError(f"split {split!r} has no document: expected one of {present}")
        return HeldoutPass(
            streams=splits[split],
            batch_size=batch_size,
            sequence_length=sequence_length,
            pad_id=self.tokenizer.pad_id,
            process_rows=rows_of_process(batch_size, sequence_length, process_index, process_count),
        )

    def _seed(self, shuffle_seed: int | None) -> int | None:
        return (self.config.seed if shuffle_seed is None else shuffle_seed) if self.config.shuffle else None

    @property
    def _identity(self) -> dict[str, Any]:
        return {"corpus": self.content_hash, "tokenizer": self.tokenizer.fingerprint, "seed": self.config.seed}


def _sizes(splits: Mapping[str, Split]) -> dict[str, Any]:
    return {
        "documents": {name: len(split) for name, split in splits.items()},
        "bytes": {name: split.byte_count for name, split in splits.items()},
    }


def open_corpus(config: DataConfig, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the corpus or the sources: stores by memory map, others by reading and splitting them; and trains or loads
    the tokenizer. A resumed run passes the one it saved.

    Raises FileNotFoundError or ValueError for files that cannot be read, an empty split, a vocabulary larger than the
    text allows, a tokenizer that does not keep every byte, or one that is not that of a store.
    """
    parts = {ONLY: config} if not config.sources else {one.name: _alone(config, one.corpus) for one in config.sources}
    _check_text_field(config)
    stores = {name: Store(part) for name, part in parts.items() if is_store(part.corpus)}
    read = {name: corpora.corpus_documents(part) for name, part in parts.items() if name not in stores}
    split = {name: corpora.split_documents(found, config=parts[name]) for name, found in read.items()}
    given = tokenizer
    if tokenizer is None and stores:
        tokenizer = next(iter(stores.values())).tokenizer
    elif tokenizer is None:
        tokenizer = make_tokenizer(config, (one.text for found in split.values() for one in found["train"]))
    if config.vocab_size is not None:
        check_vocab_size(tokenizer, config.vocab_size, name="DataConfig.vocab_size")
    tokenizer.check_lossless()
    opened = {}
    for name, part in parts.items():
        if name in stores:
            stores[name].check_tokenizer(config, given)
            stores[name].check_tokenizer(config, tokenizer)
            opened[name] = Source(stores[name].content_hash, stores[name].splits, None)
        else:
            splits = {one: TokenizedSplit(found, tokenizer) for one, found in split[name].items()}
            opened[name] = Source(corpora.content_hash(read[name]), splits, part.corpus)
    return Corpus(config=config, sources=opened, tokenizer=tokenizer)


def _alone(config: DataConfig, corpus: str) -> DataConfig:
    """The config of one source. One without fields has no text field."""
    plain = corpus == "stdlib" or (Path(corpus).exists() and not is_store(corpus) and not sources.has_fields(corpus))
    field = {"text_field": DataConfig.text_field} if plain else {}
    return dataclasses.replace(config, corpus=corpus, sources=(), **field)


def _check_text_field(config: DataConfig) -> None:
    """Raises ConfigError if no source of a blend has the field."""
    alone = [_alone(config, one.corpus) for one in config.sources]
    if alone and all(one.text_field != config.text_field for one in alone):
        expected = f"{DataConfig.text_field!r}, since nothing reads it: the sources are plain text without fields"
        raise ConfigError(f"DataConfig.text_field is {config.text_field!r}; expected {expected}")


def _skipped(corpus: str | None) -> dict[str, int]:
    """What reading the files of a corpus left out. None: of a store, whose own files say it."""
    if corpus is None or corpus == "stdlib":
        return {"unread_files": 0, "linked_folders": 0}
    return {"unread_files": sources.unread_files(corpus), "linked_folders": sources.linked_folders(corpus)}
