"""Token sequences in Megatron's `.bin` and `.idx` files, written once and read by memory map.

`.bin` holds the tokens of one document after the other. `.idx` holds, little-endian: 9 bytes MMIDIDX, 0, 0; the version
(uint64) 1; a code of the dtype (uint8); the number of sequences and that of document ends (uint64 each); the length of
each sequence (int32); its place in `.bin`, in bytes (int64); the sequence at which each document begins, and the number
of sequences (int64). Our documents are one sequence each. Source: Megatron-LM,
megatron/core/datasets/indexed_dataset.py.

Chosen against ArrayRecord, which grain reads: 200,000 documents, 166 million tokens of uint16 with Zipf's frequencies,
read one by one in random order on one core. ArrayRecord 0.8.6 with group_size 1: 1,230 documents/s (compressed), 1,100
(uncompressed); memory map: 140,000. Its compression saves 36 % of the disk (213 MB against 332 MB), 45 % with
group_size 256. Training reads documents in random order and has to feed many times what a GPU consumes.
"""

import hashlib
import mmap
import os
import struct
import threading
import weakref
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
# Of token ids; Megatron also has codes of floats, 6 and 7. We write 4 and 8.
DTYPES = {
    1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"), 5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
HEADER = struct.Struct("<9sQBQQ")
MAX_TOKENS = 2**31 - 1  # of a document: lengths are int32
# Mapped bytes after which a process gives all pages back. They stay in the page cache, but a process that reads large
# files at random would otherwise come to have all of them resident. Each read maps its own pages and up to 64 KiB
# around its first one (Linux's fault_around_bytes).
RESIDENT_BYTES, AROUND_BYTES = 2**26, 2**16
# Indices whose files are open at a time, with two descriptors each: a process often may have 1,024. A store has an
# index per unit and split, thousands in all.
MOST_OPEN = 128


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrowest dtype of tokens: uint16 below 65,500, Megatron's own bound, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, whole or not at all. Use as a context manager; `close` gives the facts."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self._prefix, self._dtype, self._lengths = prefix, dtype, []
        self._temporary = prefix.with_name(f"{prefix.name}.bin.{os.getpid()}.tmp")
        self._file, self._digest = self._temporary.open("wb"), hashlib.sha256()

    def add(self, tokens_t: np.ndarray) -> None:
        """Appends a document."""
        data = tokens_t.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(len(tokens_t))

    def close(self) -> dict[str, object]:
        """Puts both files in place. Returns the number of documents and tokens, and the SHA-256 of both files."""
        _finish(self._file)
        lengths_n = np.array(self._lengths, "<i4")
        starts_n = np.concatenate([[0], np.cumsum(lengths_n, dtype="<i8")])
        head = HEADER.pack(MAGIC, VERSION, CODES[self._dtype], len(lengths_n), len(lengths_n) + 1)
        places_n, ends_n = starts_n[:-1] * self._dtype.itemsize, np.arange(len(lengths_n) + 1)
        index = head + lengths_n.tobytes() + places_n.astype("<i8").tobytes() + ends_n.astype("<i8").tobytes()
        beside = self._temporary.with_name(self._temporary.name.replace(".bin.", ".idx."))
        with beside.open("wb") as file:
            file.write(index)
            _finish(file)
        self._temporary.replace(self._prefix.with_name(self._prefix.name + ".bin"))
        beside.replace(self._prefix.with_name(self._prefix.name + ".idx"))
        hashes = {"bin_sha256": self._digest.hexdigest(), "idx_sha256": hashlib.sha256(index).hexdigest()}
        return {"documents": len(lengths_n), "tokens": int(starts_n[-1]), **hashes}

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class Mapped(NamedTuple):
    """The maps of both files, and what the index holds of each sequence (n,) and of the documents' ends."""

    index: mmap.mmap
    data: mmap.mmap | bytes
    length_n: np.ndarray
    place_n: np.ndarray
    end_n: np.ndarray

    def give_back(self) -> None:
        """Unmaps all pages; the next reads map them again."""
        self.index.madvise(mmap.MADV_DONTNEED)
        if isinstance(self.data, mmap.mmap):
            self.data.madvise(mmap.MADV_DONTNEED)


class Residence:
    """What the reads of this process have mapped: counts it, gives pages back, and closes the files that were not read
    for longest. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0
        self._open: dict[weakref.ref[IndexedTokens], None] = {}  # the one read last comes last

    def touch(self, tokens: "IndexedTokens") -> None:
        """Its files are about to be read."""
        ref = weakref.ref(tokens, self._forget)
        with self._lock:
            self._open.pop(ref, None)
            self._open[ref] = None
            closed = list(self._open)[:-MOST_OPEN] if len(self._open) > MOST_OPEN else []
            for one in closed:
                del self._open[one]
        for one in closed:
            if (found := one()) is not None:
                found.mapped = None

    def count(self, size: int) -> None:
        """A read of `size` bytes is done."""
        with self._lock:
            self._bytes += size + AROUND_BYTES
            if self._bytes <= RESIDENT_BYTES:
                return
            self._bytes, held = 0, list(self._open)
        for one in held:
            if (tokens := one()) is not None and (mapped := tokens.mapped) is not None:
                mapped.give_back()

    def _forget(self, ref: "weakref.ref[IndexedTokens]") -> None:
        self._open.pop(ref, None)  # without the lock, which the thread that collects garbage may hold


_RESIDENCE = Residence()


class IndexedTokens:
    """The sequences of `PREFIX.bin` and `PREFIX.idx`. Nothing but the header and the last place is read until a
    sequence is, and files that are not read do not stay open: see MOST_OPEN.

    Raises ConfigError for files that do not belong together, FileNotFoundError. Files that were replaced since are
    refused when they are opened again: their lengths and places would be read by the old header.
    """

    def __init__(self, prefix: Path):
        self._bin, self._idx = (prefix.with_name(prefix.name + end) for end in (".bin", ".idx"))
        self.mapped: Mapped | None = None  # while the files are open
        with self._idx.open("rb") as file:
            head, stated = file.read(HEADER.size), os.fstat(file.fileno())
            size = stated.st_size
            if len(head) < HEADER.size or HEADER.unpack(head)[:2] != (MAGIC, VERSION):
                raise ConfigError(f"{self._idx} begins with {head[:9]!r}; expected an index of Megatron's, version 1")
            _, _, code, self._count, self._boundaries = HEADER.unpack(head)
            if code not in DTYPES:
                raise ConfigError(f"{self._idx} has tokens of dtype code {code}; expected one of {sorted(DTYPES)}")
            self._dtype = DTYPES[code]
            if (expected := HEADER.size + 12 * self._count + 8 * self._boundaries) != size:
                raise ConfigError(f"{self._idx} has {size} bytes; expected {expected} for {self._count} documents")
            end = self._end(file) if self._count else 0
        found = self._bin.stat()
        if found.st_size != end:
            raise ConfigError(f"{self._bin} has {found.st_size} bytes; expected {end}, as {self._idx.name} says")
        self._known = {self._idx: _identity(stated), self._bin: _identity(found)}

    def _end(self, file: BinaryIO) -> int:
        """The size of the .bin by its index: where its last sequence ends."""
        length = os.pread(file.fileno(), 4, HEADER.size + 4 * (self._count - 1))
        place = os.pread(file.fileno(), 8, HEADER.size + 4 * self._count + 8 * (self._count - 1))
        return int.from_bytes(place, "little", signed=True) + self._dtype.itemsize * int.from_bytes(
            length, "little", signed=True
        )

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> np.ndarray:
        """The tokens (t,) of a sequence, in memory of their own: int32, or int64 if the file has it, whose ids may not
        fit. Raises ConfigError."""
        mapped = self._maps()
        length, place = int(mapped.length_n[index]), int(mapped.place_n[index])
        if length < 0 or not 0 <= place <= len(mapped.data) - length * self._dtype.itemsize:
            expected = f"expected it within the {len(mapped.data)} bytes of {self._bin.name}"
            raise ConfigError(f"{self._idx}: sequence {index} has {length} tokens from byte {place}; {expected}")
        wide = np.int64 if self._dtype.itemsize == 8 else np.int32
        tokens_t = np.frombuffer(mapped.data, self._dtype, length, place).astype(wide) if length else np.zeros(0, wide)
        _RESIDENCE.count(2 * AROUND_BYTES + length * self._dtype.itemsize)  # of the two arrays of the index as well
        return tokens_t

    @property
    def document_count(self) -> int:
        """Documents, each of any number of sequences."""
        return max(self._boundaries - 1, 0)

    def document(self, number: int) -> np.ndarray:
        """The tokens (t,) of a document, the sequences of which are joined: int32, or int64 if the file has it. Raises
        ConfigError."""
        first, last = self._maps().end_n[number : number + 2].tolist()
        if not 0 <= first <= last <= self._count:
            expected = f"expected an ascending pair up to {self._count}"
            raise ConfigError(f"{self._idx}: document {number} has the sequences from {first} to {last}; {expected}")
        return np.concatenate([self.read(i) for i in range(first, last)] or [np.zeros(0, np.int32)])

    def _maps(self) -> Mapped:
        """The maps, which live as long as somebody holds them: another thread may close the files meanwhile."""
        _RESIDENCE.touch(self)
        mapped = self.mapped
        if mapped is None:
            mapped = self.mapped = self._open()
        return mapped

    def _map(self, path: Path) -> mmap.mmap | bytes:
        """The bytes of a file. Raises ConfigError if it is another one than at first."""
        with path.open("rb") as file:
            stated = os.fstat(file.fileno())
            if _identity(stated) != self._known[path]:
                raise ConfigError(f"{path} has changed while it was in use; expected a store that stays as it is")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if stated.st_size else b""

    def _open(self) -> Mapped:
        index, data = self._map(self._idx), self._map(self._bin)
        assert isinstance(index, mmap.mmap)  # it has a header at least
        if isinstance(data, mmap.mmap):
            data.madvise(mmap.MADV_RANDOM)
        count = self._count
        return Mapped(
            index, data,
            length_n=np.frombuffer(index, "<i4", count, HEADER.size),
            place_n=np.frombuffer(index, "<i8", count, HEADER.size + 4 * count),
            end_n=np.frombuffer(index, "<i8", self._boundaries, HEADER.size + 12 * count),
        )  # fmt: skip


def _identity(stated: os.stat_result) -> tuple[int, int, int, int]:
    """What changes if a file is replaced or written to."""
    return stated.st_dev, stated.st_ino, stated.st_size, stated.st_mtime_ns


def _finish(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
