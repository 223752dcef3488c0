"""The bytes of a WARC file as its reader gets them, kept from the start of a record for a second look: where a record
is damaged, reading goes on with the next one.

Format: ISO 28500. A record is a header, an empty line, as many bytes as its Content-Length says, and two line ends.
"""

import io
import re
from collections import deque
from typing import Any

# Kept of one record and what is behind it, for a second look at a stream that cannot be read again.
MOST_BYTES = 2**27
HEADER_BYTES = 2**16  # of a record; fastwarc reads none that is longer
OVERLAP = 100  # bytes searched twice, since two blocks may share the start of a record
_BEGIN = re.compile(rb"\nWARC/\d\.\d+\r?\n[A-Za-z-]+:")
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"\nContent-Length:[ \t]*(\d{1,15})[ \t]*\r?\n", re.IGNORECASE)
_SEPARATOR = re.compile(rb"\r?\n\r?\n|\s*\Z")


class KeptStream:
    """A stream that ends where it cannot be read, and has the error as `failure`: the bytes before it are whole."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._plain = isinstance(getattr(stream, "raw", None), io.FileIO) and stream.seekable()
        self.failure: Exception | None = None
        self._again: deque[memoryview] = deque()  # to be read once more
        self._kept: deque[bytes] = deque()
        self._first = self._place = 0  # of the first byte kept, and of the next one to be read
        self._start = self._announced = 0  # of the record that is read; its end by its header, 0 while not looked up

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, possibly fewer; none at the end and where the stream cannot be read."""
        if self._again:
            piece = self._again.popleft()
            if 0 <= size < len(piece):
                self._again.appendleft(piece[size:])
                piece = piece[:size]
            block = bytes(piece)
        else:
            block = self._next(size)
        self._place += len(block)
        self._kept.append(block)
        place = self._place - max(MOST_BYTES, len(block))
        if place > self._start and not self._announced:
            self._announced = self._announced_end()
        self._forget(place)
        return block

    def _next(self, size: int) -> bytes:
        try:
            return b"" if self.failure is not None else self._stream.read1(size)
        except Exception as error:  # of a damaged file, or of its disk; fastwarc's own errors are told apart from it
            self.failure = error
            return b""

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, place: int) -> None:
        """Its reader does not ask for it."""
        raise ValueError(f"seek to {place}; expected a file that is read in order")

    def close(self) -> None:
        """Closes the stream below."""
        self._stream.close()

    def begin(self, start: int) -> None:
        """A record begins at `start`: nothing in front of it is needed any more."""
        self._start, self._announced = start, 0
        self._forget(start)

    def _forget(self, place: int) -> None:
        while self._kept and self._first + len(self._kept[0]) <= place:
            self._first += len(self._kept.popleft())

    def end(self) -> int | None:
        """Where the record that began last ends by its header, with its line ends; None if its length is none, or no
        line ends follow it."""
        end = self._announced or self._announced_end()
        if not end or end > self._place:
            return None
        if end < self._first:  # so much was read behind it that nothing speaks against its length
            return end
        found = _SEPARATOR.match(self._since(end))
        return end + found.end() if found else None

    def _announced_end(self) -> int:
        data = self._since(self._start, HEADER_BYTES)
        header = _HEADER_END.search(data)
        length = _LENGTH.search(data, 0, header.end()) if header else None
        return self._start + header.end() + int(length[1]) if header and length else 0

    def lost(self, place: int) -> int:
        """How many bytes from `place` on can be searched no more."""
        return 0 if self._plain else max(self._first - place, 0)

    def go_on(self, place: int) -> bool:
        """Goes to the first record that begins behind `place` and what is lost there. False: there is none."""
        if place < self._first and self._plain:
            self._stream.seek(place)
            self._again.clear()
            self._kept.clear()
            self._first = self._place = place
        place = max(place, self._first)
        data = self._since(place)
        while not (found := _BEGIN.search(data)):
            if not (block := self.read(2**20)):
                return False
            seen = max(len(data) - OVERLAP, 0)
            place, data = place + seen, data[seen:] + block
        start = found.start() + 1
        self._again.appendleft(memoryview(data)[start:])
        self._kept.clear()
        self._first = self._place = place + start
        self.begin(self._place)
        return True

    def _since(self, place: int, most: int | None = None) -> bytes:
        """What is kept from `place` on, at least `most` bytes if so many are; none if `place` is no longer kept."""
        if place < self._first:
            return b""
        pieces, skipped, held = [], place - self._first, 0
        for block in self._kept:
            if skipped >= len(block):
                skipped -= len(block)
                continue
            pieces.append(block[skipped:])
            held, skipped = held + len(pieces[-1]), 0
            if most is not None and held >= most:
                break
        return b"".join(pieces)
