"""Reads gzip files with many members, such as a WARC whose records are compressed one by one: damage costs the member
that it is in.

Format: https://www.rfc-editor.org/rfc/rfc1952.
"""

import io
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

PACKED_BYTES = 2**14
HELD_BYTES = 2**26  # of a member's text: so much is compared with its checksum before any of it is read
GAP = b"\r\n(a damaged member of gzip)\r\n\r\n"  # in place of a member; no record begins with it
_BEGIN, _OVERLAP = re.compile(rb"\x1f\x8b\x08[\0-\x1f]"), 3
_RECORDS = re.compile(rb"\nWARC/\d\.\d+\r?\n")


class GzipMembers(io.RawIOBase):
    """The text of all members, one after the other, with GAP where one is damaged.

    A member of at most HELD_BYTES is read only if its checksum is right, so that damage costs it whole; a longer one is
    read as it comes, and the last of it that is held is dropped where damage shows: some wrong text may have been read.
    A last member that is cut off has no checksum, and is read as far as it goes if it has several records. Reading
    raises zlib.error if no member begins behind a damaged one, and EOFError if the last one is cut off.
    """

    def __init__(self, stream: BinaryIO):
        self._texts, self._text = _texts(stream), memoryview(b"")

    def readable(self) -> bool:
        """True: the stream is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the start of `buffer`; returns the number of bytes, 0 at the end."""
        while not self._text:
            if (text := next(self._texts, None)) is None:
                return 0
            self._text = memoryview(text)
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def _texts(stream: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while rest := rest.lstrip(b"\0") or stream.read(PACKED_BYTES):
        unpacker, packed, text, block = zlib.decompressobj(wbits=31), bytearray(), bytearray(), rest.lstrip(b"\0")
        rest = b""
        if not block:  # zeros may fill a file up
            continue
        try:
            while not unpacker.eof:
                if not block:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                packed += block
                text += unpacker.decompress(block)
                if len(text) > HELD_BYTES:
                    yield bytes(text)
                    packed.clear()
                    text.clear()
                block = b"" if unpacker.eof else stream.read(PACKED_BYTES)
            yield bytes(text)
            rest = unpacker.unused_data
        except (zlib.error, EOFError) as error:
            if not (rest := _next_member(bytes(packed[1:]), stream)):
                if isinstance(error, EOFError) and _RECORDS.search(text, 1):
                    yield bytes(text)
                raise
            yield GAP


def _next_member(packed: bytes, stream: BinaryIO) -> bytes:
    """What is read from the start of the next member on; empty if there is none."""
    while not (found := _BEGIN.search(packed)):
        if not (block := stream.read(PACKED_BYTES)):
            return b""
        packed = packed[-_OVERLAP:] + block
    return packed[found.start() :]
