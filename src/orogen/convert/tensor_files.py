"""Folders of safetensors files, read and written piece by piece: no mmap, no whole file in memory.

The format: 8 bytes of header length, the header (JSON: dtype, shape and byte range of each tensor), the bytes.
Source: https://github.com/huggingface/safetensors#format.
"""

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, MapOf, Record, Whole, check_form, read_json, read_object

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
PACKED = np.dtype(np.uint8)
QUANTISED = {"F8_E4M3": np.dtype(jnp.float8_e4m3fn), "U8": PACKED}  # only in quantised checkpoints
NAMES = {dtype: name for name, dtype in (DTYPES | QUANTISED).items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 10**8  # the limit of safetensors itself
INDEX_FORM = Record({"weight_map": MapOf(str)})
ENTRY_FORM = Record({"dtype": str, "shape": ListOf(Whole()), "data_offsets": ListOf(Whole(), 2)})
MAX_AXES = 64  # the limit of numpy
PANEL_BYTES = 1 << 20  # made contiguous at a time from a strided array, so that they stay in a core's cache
CHECKED = 1 << 17  # numbers that are checked at a time


class Spec(NamedTuple):
    """A tensor's shape and dtype in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class _Location(NamedTuple):
    file: Path
    start: int
    spec: Spec


class TensorReader:
    """The tensors of a folder, read with pread, which several threads may do at once. Use as a context manager.

    ignored: whether to skip the tensor of this name, whatever its dtype: it has no Spec and is never read.
    quantised: whether numbers of 8 bits are allowed. Raises ConfigError if the folder has no safetensors files, or one
    that is truncated, malformed or of other dtypes.
    """

    def __init__(self, folder: Path, *, ignored: Callable[[str], bool] = lambda name: False, quantised: bool = False):
        self._locations: dict[str, _Location] = {}
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        for file in _files(folder):
            for name, location in _header(file, ignored, DTYPES | QUANTISED if quantised else DTYPES).items():
                if name in self._locations:
                    raise ConfigError(f"{file}: {name} is in {self._locations[name].file.name} too; expected it once")
                self._locations[name] = location
        self.specs: Mapping[str, Spec] = {name: location.spec for name, location in self._locations.items()}

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """A new array of the tensor, or of its part at `index` of its leading axes."""
        location = self._locations[name]
        shape, dtype = location.spec
        strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
        offset = sum(i * stride for i, stride in zip(index, strides, strict=False))
        array = np.empty(shape[len(index) :], dtype)
        self._fill(location, offset * dtype.itemsize, array.reshape(-1).view(np.uint8))
        return array

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same bytes, compared a panel at a time."""
        a, b = self._locations[first], self._locations[second]
        if a.spec != b.spec:
            return False
        for start in range(0, a.spec.nbytes, PANEL_BYTES):
            size = min(PANEL_BYTES, a.spec.nbytes - start)
            left, right = np.empty(size, np.uint8), np.empty(size, np.uint8)
            self._fill(a, start, left)
            self._fill(b, start, right)
            if not np.array_equal(left, right):
                return False
        return True

    def _fill(self, location: _Location, offset: int, bytes_n: np.ndarray) -> None:
        with self._lock:
            if location.file not in self._open:
                self._open[location.file] = os.open(location.file, os.O_RDONLY)
        descriptor, view, done = self._open[location.file], _bytes(bytes_n), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], location.start + offset + done)
            if not count:
                raise ConfigError(f"{location.file} ends early; expected {location.spec.nbytes} bytes of a tensor")
            done += count


class TensorWriter:
    """Safetensors files of known tensors, whose contents may come in any order and from several threads. Use as a
    context manager.

    Headers are written first, which fixes the offset of every part of a tensor. A file with several tensors holds at
    most `shard_bytes`; several files get an index.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Spec], *, shard_bytes: int = SHARD_BYTES):
        shards = _shards(specs, shard_bytes)
        names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards))
        self._locations: dict[str, _Location] = {}
        self._open: dict[Path, int] = {}
        for name, shard in zip(names, shards, strict=True):
            file = folder / name
            header, ranges = _make_header(shard)
            self._open[file] = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(self._open[file], len(header) + sum(spec.nbytes for spec in shard.values()))
            _write_all(self._open[file], memoryview(header), 0)
            self._locations |= {key: _Location(file, len(header) + ranges[key], spec) for key, spec in shard.items()}
        if len(shards) > 1:
            total = sum(spec.nbytes for spec in specs.values())
            where = {key: location.file.name for key, location in sorted(self._locations.items())}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            for descriptor in self._open.values() if kind is None else ():
                os.fsync(descriptor)
        finally:
            for descriptor in self._open.values():
                os.close(descriptor)

    def write(self, name: str, array: np.ndarray, index: tuple[int, ...] = ()) -> None:
        """Writes the tensor's part at `index` of its leading axes, cast to the tensor's dtype."""
        location = self._locations[name]
        shape, dtype = location.spec
        rest = shape[len(index) :]
        if array.shape != rest:
            raise ValueError(f"{name}{list(index)} is {array.shape}; expected {rest}")
        strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
        offset = location.start + dtype.itemsize * sum(i * s for i, s in zip(index, strides, strict=False))
        for panel in _panels(array, dtype):
            view = _bytes(panel.reshape(-1).view(np.uint8))
            _write_all(self._open[location.file], view, offset)
            offset += len(view)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder`, which becomes `folder` if the body succeeds and is removed if it does not.

    Raises ConfigError if `folder` exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} exists; expected a new folder")
    scratch = folder.with_name(f".{folder.name}.partial")
    if scratch.exists():  # left by a conversion that was killed
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_fits(name: str, array: np.ndarray, dtype: np.dtype) -> None:
    """Raises ConfigError if a finite number of `array` would become infinite in `dtype`.

    Infinities and NaNs in `array` are kept, and small numbers are rounded, if need be to zero.
    """
    if dtype == array.dtype or jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max:
        return
    flat_n = array.reshape(-1)
    for start in range(0, len(flat_n), CHECKED):
        part_n = flat_n[start : start + CHECKED]
        with np.errstate(over="ignore"):  # reported below
            lost_n = np.isfinite(part_n) & ~np.isfinite(part_n.astype(dtype))
        if lost_n.any():
            value, largest = float(part_n[lost_n][0]), float(jnp.finfo(dtype).max)
            expected = f"finite numbers of {dtype.name}, of which {largest:.6g} is the largest"
            raise ConfigError(f"{name} holds {value:.6g}; expected {expected}")


def _panels(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """`array` as contiguous pieces in `dtype`: whole if it already is that, else a few rows at a time."""
    if array.flags.c_contiguous and array.dtype == dtype:
        yield array
        return
    rows = max(1, PANEL_BYTES // max(1, array.nbytes // max(1, len(array))))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows], dtype)


def _bytes(array_n: Any) -> memoryview:
    """The memory of an array of bytes; on Python 3.11 numpy's annotations do not declare the buffer protocol."""
    return memoryview(array_n)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], offset + done)


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX, INDEX_FORM)["weight_map"].values()))
        for name in names:
            _check_name(folder, name)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            what = f"names files that do not exist: {shown(missing)}" if missing else "names no files"
            raise ConfigError(f"{folder / INDEX} {what}; expected the shards of its folder")
        for name in names:
            _check_link(folder, name)
        return [folder / name for name in names]
    found = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not found:
        raise ConfigError(f"{str(folder)!r} has no safetensors files; expected {SINGLE} or shards with {INDEX}")
    return found


def _check_name(folder: Path, name: str) -> None:
    """Raises ConfigError unless `name`, which is untrusted, is that of a file directly in a folder."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
        raise ConfigError(f"{folder / INDEX} names {shown(name)}; expected a file of its folder, without a path")


def _check_link(folder: Path, name: str) -> None:
    """Raises ConfigError if a file that an index names is a link out of its folder, other than into a cache.

    Hugging Face's cache keeps files as `models--owner--name/blobs/HASH`, and links to them from `snapshots/COMMIT/` and
    from folders that were downloaded through it, wherever they are.
    """
    target, here = (folder / name).resolve(), folder.resolve()
    store = target.parent
    cached = store.name == "blobs" and (store.parent.name.startswith("models--") or store.parent == here.parent.parent)
    if not cached and not target.is_relative_to(here):
        raise ConfigError(f"{folder / name} is a link to {target}; expected a file of its folder or a cache's blob")


def _header(file: Path, ignored: Callable[[str], bool], dtypes: Mapping[str, np.dtype]) -> dict[str, _Location]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise ConfigError(f"{file} is not a safetensors file, or is truncated")
        try:
            header = read_object(stream.read(length), where="its JSON")
            header.pop("__metadata__", None)
            check_form(header, MapOf(ENTRY_FORM), where="its JSON")
        except ConfigError as error:
            raise ConfigError(f"{file} has no safetensors header: {error}") from None
    locations, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        spec = None if ignored(name) else _spec(f"{file}: {name}", entry, dtypes)
        if 8 + length + stop > size:
            raise ConfigError(f"{file} is truncated: {name} lies at {start} to {stop} of {size - 8 - length} bytes")
        if spec is None and stop < start:
            raise ConfigError(f"{file}: {name} lies at {start} to {stop}; expected its end after its start")
        if spec is not None and stop - start != spec.nbytes:
            takes = f"{entry['dtype']} {shown(list(spec.shape))} takes {spec.nbytes}"
            raise ConfigError(f"{file}: {name} lies at {start} to {stop}; expected {takes} bytes")
        if start != end:
            raise ConfigError(f"{file}: {name} begins at byte {start}; expected {end}, where the tensor before it ends")
        if spec is not None:
            locations[name] = _Location(file, 8 + length + start, spec)
        end = stop
    if 8 + length + end != size:
        raise ConfigError(f"{file} has {size - 8 - length} bytes of tensors; expected {end}, as its header says")
    return locations


def _spec(where: str, entry: dict[str, Any], dtypes: Mapping[str, np.dtype]) -> Spec:
    """Shape and dtype of a header's entry. Raises ConfigError for an unsupported dtype or too many axes."""
    if entry["dtype"] not in dtypes:
        but = ", not quantised weights" if dtypes is DTYPES else ""
        raise ConfigError(f"{where} is {entry['dtype']}; expected one of {', '.join(dtypes)}{but}")
    if len(entry["shape"]) > MAX_AXES:
        raise ConfigError(f"{where} has {len(entry['shape'])} axes; expected at most {MAX_AXES}")
    return Spec(tuple(entry["shape"]), dtypes[entry["dtype"]])


def _make_header(specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int]]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ranges, start = {}, 0
    # Wider dtypes first, as safetensors writes them: every tensor is then aligned.
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        stop = start + spec.nbytes
        entries[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, stop]}
        ranges[name], start = start, stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ranges


def _shards(specs: Mapping[str, Spec], limit: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
