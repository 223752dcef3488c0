"""Files of a curation: each appears under its name only when it is whole."""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from orogen.config.files import unfinished, write_atomically
from orogen.data.compressed import opened

LEVEL = 3  # of Zstandard: 300 MB/s a core


class Written(NamedTuple):
    """A file of documents: how many, the bytes of their texts, and the SHA-256 of the file."""

    name: str
    documents: int
    bytes: int
    sha256: str


class DocumentWriter:
    """Writes records as `.jsonl.zst`. The file gets its name when the `with` block ends without an error; until then
    it has a temporary one, which differs between processes, so that a process left over from a killed run does no harm.
    """

    def __init__(self, path: Path):
        import zstandard

        self._path = path
        self._temporary = unfinished(path)
        self._pack = zstandard.ZstdCompressor(level=LEVEL)
        self._documents = self._bytes = 0
        self.written: Written | None = None

    def __enter__(self) -> "DocumentWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _Hashed(self._temporary.open("wb"))
        self._stream = self._pack.stream_writer(cast(BinaryIO, self._file), closefd=False)
        return self

    def write(self, record: dict[str, Any]) -> None:
        """Adds one record, whose `text` is counted. JSON has no infinity and no NaN: such a number becomes null."""
        try:
            line = json.dumps(record, ensure_ascii=False, default=str, allow_nan=False)
        except ValueError:
            line = json.dumps(_finite(record), ensure_ascii=False, default=str)
        self._stream.write(line.encode("utf-8", "backslashreplace"))
        self._stream.write(b"\n")
        self._documents += 1
        self._bytes += len(record["text"].encode())

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._stream.close()
                self._file.sync()
                self._temporary.replace(self._path)
                digest = self._file.digest.hexdigest()
                self.written = Written(self._path.name, self._documents, self._bytes, digest)
        finally:
            self._file.raw.close()
            self._temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Hashed(io.RawIOBase):
    """A file that hashes what is written to it."""

    def __init__(self, raw: BinaryIO):
        self.raw, self.digest = raw, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.raw.write(data)

    def sync(self) -> None:
        self.raw.flush()
        os.fsync(self.raw.fileno())


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file that `DocumentWriter` wrote."""
    with opened(path) as lines:
        for line in lines:
            yield json.loads(line)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    _write(path, json.dumps(value, ensure_ascii=True).encode())


def write_lines(path: Path, values: list[Any]) -> None:
    """Writes one line of JSON per value, whole or not at all."""
    _write(path, "".join(json.dumps(value, ensure_ascii=True) + "\n" for value in values).encode())


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays as `.npz`, whole or not at all."""
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    _write(path, packed.getvalue())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
