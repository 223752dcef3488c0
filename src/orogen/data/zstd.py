"""Reads Zstandard files of any window and any number of frames, decompressing piece by piece.

Format: https://www.rfc-editor.org/rfc/rfc8878.
"""

import io
from typing import Any, BinaryIO

MAX_WINDOW_BYTES = 2**31  # the largest that `zstd --long=31` writes; memory is allocated as the text fills it
# Compressed bytes read at a time. A block of 4 bytes may expand to 128 KiB, so this is at most 32 MiB of text.
PACKED_BYTES = 1 << 10


class ZstdFrames(io.RawIOBase):
    """The text of all frames of a stream, one after the other; skippable frames have none.

    Reading raises ValueError if the stream is damaged or ends inside a frame.
    """

    def __init__(self, stream: BinaryIO):
        import zstandard  # here, so that only readers of .zst need it

        self._stream = stream
        self._error = zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self._frame: Any = None
        self._packed = self._text = memoryview(b"")

    def readable(self) -> bool:
        """True: the stream is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the start of `buffer`; returns the number of bytes, 0 at the end."""
        while not self._text:
            if not self._packed:
                self._packed = memoryview(self._stream.read(PACKED_BYTES))
                if not self._packed:
                    return self._finish()
            self._text = memoryview(self._unpack())
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count

    def _unpack(self) -> bytes:
        self._frame = self._frame or self._unpacker.decompressobj()
        try:
            text = self._frame.decompress(self._packed)
        except self._error as error:
            raise ValueError(str(error)) from None
        self._packed = memoryview(self._frame.unused_data if self._frame.eof else b"")
        if self._frame.eof:
            self._frame = None
        return text

    def _finish(self) -> int:
        if self._frame is not None:
            raise ValueError("it ends inside a frame")
        return 0
