"""Files, plain or compressed: their bytes, and the errors of damaged ones."""

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from orogen.data.zstd import ZstdFrames

# Errors that a damaged file raises.
DAMAGE = (EOFError, ValueError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
# By the ending of a name.
OPENERS: dict[str, Callable] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda stream: io.BufferedReader(ZstdFrames(stream)),
}


@contextlib.contextmanager
def opened(file: Path, *, openers: Mapping[str, Callable] = MappingProxyType({})) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as its name says. openers: by ending, in place of the usual ones."""
    packing = next((packing for packing in OPENERS if file.name.endswith(packing)), None)
    with file.open("rb") as stream:
        if packing is None:
            yield stream
        else:
            with (openers.get(packing) or OPENERS[packing])(stream) as lines:
                yield lines
