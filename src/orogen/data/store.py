"""A tokenized corpus on disk, which training reads by memory map.

A store is a folder with `SPLIT-NUMBER.bin` and `.idx` (see `indexed`) for each unit of the corpus and split, the
tokenizer, `broken.jsonl` (what was left out, and why), and `manifest.json`, which is written last. The documents of a
split are those of its shards, one after the other: the order of the corpus, so that a store and the same corpus in
memory give the same batches. A document's tokens end with eos.
"""

import bisect
import functools
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.files import write_atomically
from orogen.config.json_file import ListOf, Record, Whole, read_json
from orogen.data.corpora import SPLITS, check_splits
from orogen.data.indexed import IndexedTokens
from orogen.data.packing import Stream, document_stream
from orogen.data.sources import FORMAT_NAME, MANIFEST, TOKENIZER, is_begun, is_finished
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import make_tokenizer

DONE, BROKEN = "done", "broken.jsonl"
FORMAT = f"{FORMAT_NAME} 1"
# The fields of DataConfig that decide what a store holds.
SETTINGS = (
    "corpus", "tokenizer", "vocab_size", "text_field", "record_dtype", "heldout_fraction", "tuning_fraction", "seed",
)  # fmt: skip
COUNT = Whole(0, 2**63 - 1)
SHARD_FORM = Record({"name": str, "split": str, "documents": COUNT, "tokens": COUNT, "bytes": COUNT}, {})
FORM = Record({"format": str, "settings": dict, "tokenizer": str, "sha256": str, "shards": ListOf(SHARD_FORM)}, {})


def shard(folder: Path, split: str, number: int) -> Path:
    """The path of a shard without the ending of its two files."""
    return folder / f"{split}-{number:05}"


def code_hash() -> str:
    """SHA-256 of the files of this package: what turned the corpus into these bytes."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_manifest(folder: Path, plan: dict[str, Any]) -> None:
    """Writes broken.jsonl and the manifest of a store whose units are all done. Raises ConfigError if a split that the
    settings ask for has no text."""
    digest, counts, shards, broken = hashlib.sha256(), Counter(), [], []
    for number in range(len(plan["units"])):
        facts = json.loads((folder / DONE / f"{number:05}.json").read_text())
        digest.update(bytes.fromhex(facts["sha256"]))
        counts.update(facts["counts"])
        for split, found in facts["shards"].items():
            shards.append({"name": shard(folder, split, number).name, "split": split, **found})
        broken += facts["broken"]
    text_bytes = {split: sum(one["bytes"] for one in shards if one["split"] == split) for split in SPLITS}
    check_splits(text_bytes, counts["documents"], config=DataConfig(**plan["settings"]))
    lines = (json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in broken)
    write_atomically(folder / BROKEN, "".join(lines).encode())
    stamps = [one for one in plan["stamps"].values() if one is not None]
    manifest = {
        "format": FORMAT,
        "settings": plan["settings"],
        "sha256": digest.hexdigest(),
        "tokenizer": plan["tokenizer"],
        "code": plan["code"],
        "files": len(plan["stamps"]),
        "file_bytes": sum(size for size, _ in stamps),
        "counts": dict(counts),
        "shards": shards,
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def broken_records(folder: Path, count: int) -> list[dict[str, str]]:
    """The first records that were left out: their keys and why."""
    with (folder / BROKEN).open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def is_store(path: str | Path) -> bool:
    """Whether the path is a store, not a folder of texts with a manifest.json of its own. Raises ConfigError for a
    store that is not whole yet."""
    folder = Path(path)
    if path == "stdlib":
        return False
    if is_begun(folder):
        expected = "expected `orogen tokenize` to have finished it"
        raise ConfigError(f"{str(path)!r} is a store that is not whole; {expected}")
    return is_finished(folder)


class StoredSplit(Sequence[Stream]):
    """The documents of one split of a store as token streams [bos, document, eos]. byte_count: UTF-8 bytes of their
    text; token_count: their tokens, eos included."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._shards = [IndexedTokens(folder / one["name"]) for one in shards]
        for one, found in zip(shards, self._shards, strict=True):
            if len(found) != one["documents"]:
                expected = f"expected {one['documents']}, as {MANIFEST} says"
                raise ConfigError(f"{folder / one['name']}.idx has {len(found)} documents; {expected}")
        self._ends = list(np.cumsum([one["documents"] for one in shards], dtype=np.int64).tolist())
        self.byte_count = sum(one["bytes"] for one in shards)
        self.token_count = sum(one["tokens"] for one in shards)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        return document_stream(self.ids(int(index)), bos_id=self._tokenizer.bos_id, eos_id=self._tokenizer.eos_id)

    def ids(self, index: int) -> np.ndarray:
        """The tokens (t,) int32 of a document, without bos and eos. Raises ConfigError if they are not of the
        vocabulary."""
        number = bisect.bisect_right(self._ends, index)
        tokens_t = self._shards[number].read(index - (self._ends[number - 1] if number else 0))
        if tokens_t.size and not 0 <= tokens_t.min() <= tokens_t.max() < self._tokenizer.vocab_size:
            found = f"document {index} of a store has token {tokens_t.max()}"
            raise ConfigError(f"{found}; expected one below {self._tokenizer.vocab_size}: the store is damaged")
        return tokens_t[:-1]

    def texts(self) -> Iterator[bytes]:
        """The text of each document in UTF-8."""
        return (self._tokenizer.text_bytes(self.ids(index)) for index in range(len(self)))


class Store:
    """A whole store. Raises ConfigError if a file is missing or has another size than the manifest says, or if the
    config does not fit it."""

    def __init__(self, config: DataConfig):
        self.folder = Path(config.corpus)
        manifest = read_json(self.folder / MANIFEST, FORM)
        if manifest["format"] != FORMAT:
            raise ConfigError(f"{self.folder / MANIFEST} has format {manifest['format']!r}; expected {FORMAT!r}")
        self._check_settings(manifest["settings"], config)
        self.content_hash: str = manifest["sha256"]
        self.tokenizer = Tokenizer.load(self.folder / TOKENIZER).as_in_training()
        if self.tokenizer.fingerprint != manifest["tokenizer"]:
            raise ConfigError(f"{self.folder / TOKENIZER} is another tokenizer; expected that of {MANIFEST}")
        self._shards = manifest["shards"]

    @functools.cached_property
    def splits(self) -> dict[str, StoredSplit]:
        """The splits by name."""
        return {
            name: StoredSplit(self.folder, [one for one in self._shards if one["split"] == name], self.tokenizer)
            for name in SPLITS
        }

    def check_tokenizer(self, config: DataConfig, known: Tokenizer | None) -> None:
        """Raises ConfigError unless the store's tokenizer is `known` or, if that is None, what the config names."""
        if known is None and config.tokenizer != "bpe":  # the store has the one that was trained
            known = make_tokenizer(config, ())
        if known is not None and known.fingerprint != self.tokenizer.fingerprint:
            raise ConfigError(f"{str(self.folder)!r} was tokenized with another tokenizer; expected that of the run")

    def _check_settings(self, made: dict[str, Any], config: DataConfig) -> None:
        of_files = "text_field", "record_dtype", "vocab_size"
        for name in ("heldout_fraction", "tuning_fraction", "seed", *of_files):
            value = getattr(config, name)
            free = name in of_files and value == getattr(DataConfig, name)
            if value != made.get(name) and not free:
                expected = f"expected {made.get(name)!r}, with which {str(self.folder)!r} was tokenized"
                raise ConfigError(f"DataConfig.{name} is {value!r}; {expected}")
        if (config.tokenizer == "bpe") != (made.get("tokenizer") == "bpe"):
            expected = f"expected {made.get('tokenizer')!r}, with which {str(self.folder)!r} was tokenized"
            raise ConfigError(f"DataConfig.tokenizer is {config.tokenizer!r}; {expected}")
