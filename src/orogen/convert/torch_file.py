"""A torch file of before version 1.6 (`.pth`), read without torch: pickles of names, then the numbers.

The file is five pickles in a row – a magic number, the protocol, sizes of types, the object, and the keys of its
storages – and after them each storage as its length (int64) and its numbers. Of the pickles only the names below may
be called, all of them functions of this file or of the standard library that make containers: nothing else is
executed. Source: `_legacy_save` of torch/serialization.py.
"""

import collections
import math
import pickle
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from orogen.config.checks import ConfigError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "LongStorage": np.int64,
    "IntStorage": np.int32, "ByteStorage": np.uint8,
}  # fmt: skip


class _Storage(NamedTuple):
    key: str
    dtype: Any
    size: int


class _View(NamedTuple):
    """A tensor before its storage is read. offset, strides: in numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor as a view of its storage. Raises ValueError if it has numbers beyond that."""
        parts = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(type(one) is int and one >= 0 for one in parts):
            raise ValueError(f"a tensor of shape {self.shape}, strides {self.strides}, offset {self.offset}")
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if math.prod(self.shape) and last >= len(numbers):
            raise ValueError(f"a tensor that ends at {last} in a storage of {len(numbers)}")
        strides = tuple(numbers.itemsize * stride for stride in self.strides)
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides, writeable=False)


def _view(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _View:
    return _View(storage, offset, tuple(shape), tuple(strides))


class _Names(pickle.Unpickler):
    """Unpickles names, containers and views, and refuses everything else."""

    CALLED = {("collections", "OrderedDict"): collections.OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _view}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Only what CALLED names, or the type of a storage, which is only named."""
        if module_name == "torch" and global_name in STORAGES:
            return global_name
        if (module_name, global_name) not in self.CALLED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not a part of tensors")
        return self.CALLED[module_name, global_name]

    def persistent_load(self, pid: Any) -> _Storage:
        """('storage', type, key, device, length, None)"""
        kind, name, key, _, size, *_ = pid
        if kind != "storage" or name not in STORAGES or not (type(size) is int and size >= 0):
            raise pickle.UnpicklingError("it has a storage of an unknown form")
        return _Storage(key, STORAGES[name], size)


def read_torch_file(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, read-only. Raises ConfigError for a file of another form, OSError."""
    try:
        with file.open("rb") as opened:
            return _read(opened)
    except OSError:
        raise
    except Exception as error:  # an unpickler raises almost anything on damaged data
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{file} cannot be read ({why}); expected tensors as torch before 1.6 saved them") from error


def _read(opened: IO[bytes]) -> dict[str, np.ndarray]:
    load = lambda: _Names(opened).load()  # noqa: E731
    if (magic := load()) != MAGIC or load() != PROTOCOL:
        raise ValueError(f"it begins with {str(magic)[:40]}")
    load()
    views, keys = load(), load()
    sizes = {view.storage.key: view.storage for view in views.values()}
    numbers = {}
    for key in keys:
        storage = sizes[key]
        length = int.from_bytes(opened.read(8), "little")
        data = opened.read(length * np.dtype(storage.dtype).itemsize) if length == storage.size else b""
        if len(data) != storage.size * np.dtype(storage.dtype).itemsize:
            raise ValueError(f"storage {key} has not the {storage.size} numbers that its tensors expect")
        numbers[key] = np.frombuffer(data, storage.dtype)
    return {name: view.of(numbers[view.storage.key]) for name, view in views.items()}
