"""The arrays of a pruning in a file of their own, since JSON of a large model's would be gigabytes; and which weights
scores were taken of."""

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orogen.checkpoint.leaves import dotted
from orogen.compress.rewrite import Source
from orogen.config.checks import ConfigError
from orogen.convert.names import Path as Leaf

ARRAYS = "pruning.npz"
LARGEST = 2**26  # numbers of a matrix that a fingerprint reads; above are only stacks of experts
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def encoded_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays as an uncompressed .npz file."""
    stream = io.BytesIO()
    np.savez(stream, **dict(arrays))  # type: ignore[arg-type]  # the names are those of arrays
    return stream.getvalue()


def read_arrays(file: Path, prefix: str) -> dict[str, np.ndarray]:
    """The float64 arrays of an uncompressed .npz file whose names begin with `prefix`, without it.

    Nothing is unpickled, and no array is larger than its part of the file. Raises ConfigError for a file that is none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                info.filename.removeprefix(prefix).removesuffix(".npy"): _read(archive, info, file)
                for info in archive.infolist()
                if info.filename.startswith(prefix)
            }
    except ConfigError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError) as error:
        raise ConfigError(f"{file} cannot be read ({type(error).__name__}); expected the arrays of a pruning") from None


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> np.ndarray:
    with archive.open(info) as stream:
        header = _HEADERS.get(np.lib.format.read_magic(stream))
        shape, _, dtype = header(stream) if header is not None else ((), False, None)
    plain = info.compress_type == zipfile.ZIP_STORED and dtype == np.float64
    if not plain or math.prod(shape) * 8 > info.file_size:
        raise ConfigError(f"{file}: {info.filename} is no whole array of float64; expected one")
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def fingerprint(source: Source) -> str:
    """A hash of one matrix of each layer, another parameter in turn, as float32: equal for equal weights in whatever
    folder, different after training. Stacks of experts are left out if they are large."""
    found, main = hashlib.sha256(), source.homes
    for number, home in enumerate(main):
        layer, size = source.layer(number), len(home.path)
        shapes = {path[size:]: spec.shape[len(home.index) :] for path, spec in source.specs.items()
                  if path[:size] == home.path}  # fmt: skip
        names = sorted((name for name, shape in shapes.items() if _is_small_matrix(shape)), key=dotted)
        if names:
            name: Leaf = names[number % len(names)]
            array: Any = np.ascontiguousarray(layer[name], np.float32)
            found.update(dotted(name).encode())
            found.update(array.tobytes())
    return found.hexdigest()


def _is_small_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and math.prod(shape) <= LARGEST
