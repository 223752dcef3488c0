"""A database of captions by the embeddings of their images: built, extended, reduced and searched without training.

A folder holds `database.json`, which names the version that is current, and that version's folder: `embeddings.npy`
(n, e) float32 of length 1, `ids.npy`, `records.jsonl` with `offsets.npy`, and `index.faiss` unless the search is
exact. A change writes a new version beside the old one and then names it, so that a reader or a crash finds one of the
two whole; one process changes a database at a time. All files are read by memory map and stay open, so that a reader
keeps the version that it has found.

Letters: n entries, b queries, e embedding, k neighbours.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.files import locked, write_atomically
from orogen.config.json_file import Record, Whole, read_json, read_object
from orogen.vision.encoder import Encoder
from orogen.vision.index import FLAT, HNSW, IVF, check_index, read_index, write_index

FACTS, EMBEDDINGS, IDS, RECORDS, OFFSETS, INDEX = (
    "database.json", "embeddings.npy", "ids.npy", "records.jsonl", "offsets.npy", "index.faiss",
)  # fmt: skip
FORMAT = 1
FORM = Record({"format": Whole(1, 1), "version": Whole(0), "encoder": str, "encoder_name": str, "index": str,
               "dimension": Whole(1, 2**16), "entries": Whole(0), "next_id": Whole(0), "content": str})  # fmt: skip
RECORD = Record({"caption": str, "source": str})
LOCK = "database.lock"
BLOCK = 65536  # embeddings that an exact search multiplies at a time
QUERIES = 256  # that are searched for at a time: their scores of a block take 64 MiB
EXACT_ENTRIES = 50_000  # that a core compares with a query in less than 5 ms (experiments/revilm/search.jsonl)


class Entry(NamedTuple):
    """What the database knows of an image. source: where it came from."""

    caption: str
    source: str


class Hit(NamedTuple):
    """A neighbour. score: the cosine of the two images' embeddings."""

    id: int
    score: float
    caption: str
    source: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """What `database.json` says. encoder: the fingerprint of the encoder whose embeddings it holds; content: a hash of
    everything that answers depend on: embeddings, captions, sources, the kind of index, and an HNSW index's graph,
    which depends on what was added together."""

    version: int
    encoder: str
    encoder_name: str
    index: str
    dimension: int
    entries: int
    next_id: int
    content: str


class Database:
    """An open database. Raises ConfigError if the folder holds none, or one that is damaged or of another encoder.

    encoder: the one whose embeddings will be searched for; None: not known, as for a change without images.
    """

    def __init__(self, folder: Path, encoder: Encoder | None = None):
        self.folder = folder
        while True:
            self.facts = _read_facts(folder)
            self._check_encoder(encoder)
            try:
                self._open(folder / _version(self.facts.version))
                return
            except ConfigError:
                # Whoever changed the database meanwhile has removed the version that was current.
                if _read_facts(folder).version == self.facts.version:
                    raise

    def _check_encoder(self, encoder: Encoder | None) -> None:
        if encoder is not None and (encoder.fingerprint, encoder.dimension) != (
            self.facts.encoder, self.facts.dimension,
        ):  # fmt: skip
            raise ConfigError(
                f"database {str(self.folder)!r} is of encoder {self.facts.encoder_name!r} ({self.facts.encoder[:12]}, "
                f"dimension {self.facts.dimension}); expected {encoder.name!r} ({encoder.fingerprint[:12]}, dimension "
                f"{encoder.dimension})"
            )

    def _open(self, here: Path) -> None:
        shape = (self.facts.entries, self.facts.dimension)
        self.embeddings_ne = _load(here / EMBEDDINGS, shape, np.float32)
        self.id_n = _load(here / IDS, shape[:1], np.int64)
        self._offset_n = _load(here / OFFSETS, (shape[0] + 1,), np.int64)
        self._records = _map(here / RECORDS, int(self._offset_n[-1]))
        self._index = None
        if (kind := self.facts.index) != FLAT:
            self._index = read_index(here / INDEX, kind, entries=shape[0], dimension=shape[1])

    def __len__(self) -> int:
        return self.facts.entries

    def entry(self, place: int) -> Entry:
        """The entry at an index, from 0. Raises ConfigError for one that is damaged."""
        start, stop = self._offset_n[place : place + 2]
        where = f"{self.folder / _version(self.facts.version) / RECORDS}, entry {place}"
        found = read_object(bytes(self._records[start:stop]), RECORD, where=where)
        return Entry(found["caption"], found["source"])

    def entries(self) -> Iterator[Entry]:
        """All entries, in their order."""
        return map(self.entry, range(len(self)))

    def search(self, query_be: np.ndarray, k: int) -> list[list[Hit]]:
        """The k entries nearest to each query by cosine, best first; fewer if the database has fewer, and of an index
        that is not exact perhaps not the nearest, and fewer. Hits with equal scores are in the order of the entries;
        which of several with the k-th score are among the hits is not promised."""
        query_be = unit(np.asarray(query_be, np.float32))
        k = min(k, len(self))
        if not k:
            return [[] for _ in query_be]
        found: list[list[Hit]] = []
        for start in range(0, len(query_be), QUERIES):
            part_be = query_be[start : start + QUERIES]
            place_bk = self._exact(part_be, k) if self._index is None else self._index.search(part_be, k)[1]
            found += [self._hits(*pair) for pair in zip(part_be, place_bk, strict=True)]
        return found

    def _hits(self, query_e: np.ndarray, place_k: np.ndarray) -> list[Hit]:
        place_k = np.sort(place_k[place_k >= 0])  # an index reports -1 where it found fewer
        hits = [self._hit(query_e, place) for place in place_k]
        return sorted(hits, key=lambda hit: -hit.score)

    def _hit(self, query_e: np.ndarray, place: int) -> Hit:
        score = float(self.embeddings_ne[place] @ query_e)
        return Hit(int(self.id_n[place]), score, *self.entry(int(place)))

    def _exact(self, query_be: np.ndarray, k: int) -> np.ndarray:
        """Indices (b, k)."""
        best: tuple[np.ndarray, np.ndarray] | None = None
        for start in range(0, len(self), BLOCK):
            score_bn = query_be @ self.embeddings_ne[start : start + BLOCK].T
            place_bn = np.broadcast_to(np.arange(start, start + score_bn.shape[1]), score_bn.shape)
            if best is not None:
                score_bn, place_bn = (
                    np.concatenate(pair, axis=1) for pair in zip(best, (score_bn, place_bn), strict=True)
                )
            if score_bn.shape[1] > 4 * k:  # sorting all of a block takes longer than the product
                kept_bk = np.sort(np.argpartition(-score_bn, k - 1, axis=1)[:, :k], axis=1)
            else:
                kept_bk = np.broadcast_to(np.arange(score_bn.shape[1]), score_bn.shape)
            score_bk, place_bk = (np.take_along_axis(a, kept_bk, 1) for a in (score_bn, place_bn))
            order_bk = np.argsort(-score_bk, axis=1, kind="stable")[:, :k]
            best = np.take_along_axis(score_bk, order_bk, 1), np.take_along_axis(place_bk, order_bk, 1)
        assert best is not None
        return best[1]


def create(folder: Path, encoder: Encoder, embedding_ne: np.ndarray, entries: Sequence[Entry], *, index: str) -> Facts:
    """Writes a new database. index: flat, exact; ivf or hnsw, faster and not exact, by faiss. Raises ConfigError."""
    check_new(folder, index)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, LOCK):
        check_new(folder, index)
        facts = Facts(0, encoder.fingerprint, encoder.name, index, encoder.dimension, 0, len(entries), "")
        return _write(folder, facts, np.arange(len(entries)), unit(embedding_ne), entries)


def default_index(entries: int) -> str:
    """The kind of index that searches so many entries within 5 ms."""
    return FLAT if entries <= EXACT_ENTRIES else IVF


def check_new(folder: Path, index: str) -> None:
    """Raises ConfigError unless a database with this index can be created in `folder`."""
    check_index(index)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is a file; expected a new folder for a database")
    if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"{str(folder)!r} is not empty; expected a new folder for a database")


def add(folder: Path, encoder: Encoder, embedding_ne: np.ndarray, entries: Sequence[Entry]) -> Facts:
    """Appends entries. Raises ConfigError if the database is of another encoder."""
    with _changing(folder):
        old = Database(folder, encoder)
        new_n = old.facts.next_id + np.arange(len(entries))
        facts = dataclasses.replace(old.facts, next_id=old.facts.next_id + len(entries))
        together_ne = np.concatenate([old.embeddings_ne, unit(embedding_ne)])
        id_n, before = np.concatenate([old.id_n, new_n]), folder / _version(old.facts.version) / INDEX
        return _write(folder, facts, id_n, together_ne, [*old.entries(), *entries], before=before)


def remove(folder: Path, ids: Iterable[int]) -> Facts:
    """Removes the entries with these ids; others keep theirs. An index is built anew from these: no kind loses entries
    otherwise. Raises ConfigError if one is not there."""
    with _changing(folder):
        old, gone = Database(folder), set(ids)
        if unknown := sorted(gone - set(old.id_n.tolist())):
            raise ConfigError(f"database {str(folder)!r} has no entry {unknown[0]}; expected ids of its entries")
        kept_n = np.array([one not in gone for one in old.id_n.tolist()], bool)
        entries = [entry for entry, kept in zip(old.entries(), kept_n, strict=True) if kept]
        return _write(folder, old.facts, old.id_n[kept_n], old.embeddings_ne[kept_n], entries)


@contextlib.contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Raises ConfigError if there is no database, or another process changes it."""
    _read_facts(folder)
    with locked(folder, LOCK):
        yield


def unit(embedding_ne: np.ndarray) -> np.ndarray:
    """Embeddings of length 1, float32; zeros stay zeros. Raises ConfigError for numbers that are not finite."""
    if not np.isfinite(embedding_ne).all():
        raise ConfigError("an embedding is not finite; expected finite numbers")
    length_n1 = np.linalg.norm(embedding_ne, axis=1, keepdims=True)
    return (embedding_ne / np.where(length_n1 == 0, 1, length_n1)).astype(np.float32)


def _write(
    folder: Path, facts: Facts, id_n: np.ndarray, embedding_ne: np.ndarray, entries: Sequence[Entry], *,
    before: Path | None = None,
) -> Facts:  # fmt: skip
    """Writes the next version and makes it the current one. before: the index of the first of the embeddings."""
    if embedding_ne.shape != (len(entries), facts.dimension):
        raise ValueError(f"embeddings {embedding_ne.shape}; expected {(len(entries), facts.dimension)}")
    here = folder / _version(facts.version + 1)
    shutil.rmtree(here, ignore_errors=True)  # left by an interrupted change
    here.mkdir()
    try:
        content = _write_files(here, facts.index, id_n, embedding_ne, entries)
        if facts.index != FLAT:
            write_index(here / INDEX, facts.index, embedding_ne, before=before)
        if facts.index == HNSW:
            content = _with_file(content, here / INDEX)
    except BaseException:
        shutil.rmtree(here, ignore_errors=True)
        raise
    facts = dataclasses.replace(facts, version=facts.version + 1, entries=len(entries), content=content)
    write_atomically(folder / FACTS, json.dumps({"format": FORMAT, **dataclasses.asdict(facts)}, indent=2).encode())
    shutil.rmtree(folder / _version(facts.version - 1), ignore_errors=True)
    return facts


def _write_files(
    here: Path, index: str, id_n: np.ndarray, embedding_ne: np.ndarray, entries: Sequence[Entry]
) -> str:  # fmt: skip
    """Writes the files of a version but for its index. Returns the hash of its content."""
    lines = [json.dumps(entry._asdict()).encode() + b"\n" for entry in entries]
    records, lengths = b"".join(lines), [len(line) for line in lines]
    np.save(here / EMBEDDINGS, embedding_ne)
    np.save(here / IDS, id_n.astype(np.int64))
    (here / RECORDS).write_bytes(records)
    np.save(here / OFFSETS, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    digest = hashlib.sha256(index.encode())
    for part in (embedding_ne.tobytes(), records):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _with_file(content: str, file: Path) -> str:
    """A hash of this one and of the file."""
    with file.open("rb") as stream:
        return hashlib.sha256(content.encode() + hashlib.file_digest(stream, "sha256").digest()).hexdigest()


def _read_facts(folder: Path) -> Facts:
    if not (folder / FACTS).is_file():
        raise ConfigError(f"database {str(folder)!r} has no {FACTS}; expected the folder of a database")
    facts = read_json(folder / FACTS, FORM)
    return Facts(**{field.name: facts[field.name] for field in dataclasses.fields(Facts)})


def _version(number: int) -> str:
    return f"version_{number:06d}"


def _load(file: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, tokenize.TokenError) as error:  # the last, of damaged headers
        why = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read ({why}); expected an array {list(shape)}") from error
    if found.shape != shape or found.dtype != dtype:
        raise ConfigError(f"{file} is {found.dtype} {list(found.shape)}; expected {np.dtype(dtype)} {list(shape)}")
    return found


def _map(file: Path, size: int) -> mmap.mmap | bytes:
    """The bytes of a file of this size, by memory map."""
    why = f"{file} is missing or cut short; expected {size:,} bytes"
    try:
        with file.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size != size:
                raise ConfigError(why)
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except FileNotFoundError as error:
        raise ConfigError(why) from error
