"""The features of a corpus's images, computed once by a frozen encoder and read by memory map.

Letters: n images, p vectors of an image, v their width, e embedding.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.json_file import ListOf, MapOf, Record, read_json
from orogen.data.interleaved import Interleaved, read_interleaved
from orogen.vision.encoder import BATCH, Encoder
from orogen.vision.transforms import ImageError, decode

FEATURES, EMBEDDINGS, DOCUMENTS = "features.npy", "embeddings.npy", "documents.json"
FORM = Record({"documents": ListOf(Record({"key": str, "parts": list})), "broken": MapOf(str)})


class Document(NamedTuple):
    """A document whose images are encoded. parts: text, or the number of an image, in order."""

    key: str
    parts: tuple[str | int, ...]


class Encoded(NamedTuple):
    """The documents of a corpus. features_npv, embedding_ne: of its images, by memory map; broken: documents left out,
    with the reason, by key."""

    documents: list[Document]
    features_npv: np.ndarray
    embedding_ne: np.ndarray
    broken: dict[str, str]
    content_hash: str


def encode_corpus(
    corpus: str, encoder: Encoder, folder: Path, *, log: Callable[[str], None] = lambda line: None
) -> Encoded:
    """The documents of a corpus with their images encoded, from `folder` if it has them, else computed and kept there.

    A document with an image that cannot be decoded is left out and counted. Raises ConfigError if none is left.
    """
    content = _content_hash(read_interleaved(corpus))
    kept = folder / f"{encoder.fingerprint[:16]}-{content[:16]}"
    if not (kept / DOCUMENTS).is_file():
        log(f"encoding the images of {corpus!r} into {kept}")
        _encode(read_interleaved(corpus), encoder, kept)
    facts = read_json(kept / DOCUMENTS, FORM)
    documents = [Document(one["key"], tuple(one["parts"])) for one in facts["documents"]]
    images = sum(isinstance(part, int) for one in documents for part in one.parts)
    if not images:
        raise ConfigError(f"corpus {corpus!r} has no image that can be decoded; expected one")
    features_npv, embedding_ne = (np.load(kept / name, mmap_mode="r") for name in (FEATURES, EMBEDDINGS))
    if features_npv.shape != (images, *encoder.shape):
        raise ConfigError(f"{kept / FEATURES} is {list(features_npv.shape)}; expected {[images, *encoder.shape]}")
    return Encoded(documents, features_npv, embedding_ne, facts["broken"], content)


def _content_hash(documents: Iterable[Interleaved]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.key, *document.parts):
            data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _encode(documents: Iterable[Interleaved], encoder: Encoder, target: Path) -> None:
    """Writes the folder `target`, whole or not at all."""
    # Process ids recur in a container that starts again, and a killed process leaves its folder.
    scratch = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    try:
        _write(documents, encoder, scratch)
        if not target.exists():  # another run may have been faster
            scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(documents: Iterable[Interleaved], encoder: Encoder, scratch: Path) -> None:
    """Writes features, embeddings and documents into a folder. Of the images, a batch is in memory at a time."""
    found: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    waiting: list[np.ndarray] = []
    count = 0
    with (
        _Rows(scratch / FEATURES, encoder.shape) as features,
        _Rows(scratch / EMBEDDINGS, (encoder.dimension,)) as embeddings,
    ):

        def flush() -> None:
            made = encoder.encode_pixels(waiting)
            features.append(made.features_bpd)
            embeddings.append(made.embedding_be)
            waiting.clear()

        for document in documents:
            try:
                pixels = [encoder.transform(decode(part)) for part in document.parts if isinstance(part, bytes)]
            except ImageError as error:
                broken[document.key] = str(error)
                continue
            parts: list[str | int] = []
            for part in document.parts:
                parts.append(part if isinstance(part, str) else count)
                count += isinstance(part, bytes)
            found.append({"key": document.key, "parts": parts})
            waiting += pixels
            if len(waiting) >= BATCH:
                flush()
        flush()
    write_atomically(scratch / DOCUMENTS, json.dumps({"documents": found, "broken": broken}).encode())


class _Rows:
    """A .npy file of float32 rows whose number is not known in advance. Use as a context manager."""

    ROOM = 128  # bytes of the header, with room for any number of rows

    def __init__(self, file: Path, shape: tuple[int, ...]):
        self._file, self._shape, self._count = file.open("wb"), shape, 0
        self._file.write(b"\0" * self.ROOM)

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.seek(0)
        text = repr({"descr": "<f4", "fortran_order": False, "shape": (self._count, *self._shape)})
        self._file.write(b"\x93NUMPY\x01\x00" + (self.ROOM - 10).to_bytes(2, "little"))
        self._file.write(text.encode().ljust(self.ROOM - 11) + b"\n")
        self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Appends rows."""
        self._file.write(np.ascontiguousarray(rows, np.float32).tobytes())
        self._count += len(rows)
