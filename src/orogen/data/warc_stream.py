"""The bytes of a WARC file as its reader gets them, kept from the start of a record for a second look: where a record
is damaged, reading goes on with the next one.

Format: ISO 28500. A record is a header, an empty line, as many bytes as its Content-Length says, and two line ends.
"""

import re
from collections import deque
from typing import Any

# Kept of one record and what is behind it: in a longer one that is damaged, no record is looked for before that.
MOST_BYTES = 2**27
OVERLAP = 100  # bytes searched twice, since two blocks may share the start of a record
_BEGIN = re.compile(rb"\nWARC/\d\.\d+\r?\n[A-Za-z-]+:")
_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"\nContent-Length:[ \t]*(\d{1,15})[ \t]*\r?\n", re.IGNORECASE)
_SEPARATOR = re.compile(rb"\r?\n\r?\n|\s*\Z")


class KeptStream:
    """A stream that ends where it is damaged, and has the error as `failure`: the bytes before it are whole."""

    def __init__(self, stream: Any, damage: tuple[type[Exception], ...]):
        self._stream, self._damage = stream, damage
        self.failure: Exception | None = None
        self._again = b""  # to be read once more
        self._kept: deque[bytes] = deque()
        self._first = self._place = 0  # of the first byte kept, and of the next one to be read

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, no more than one block, which damage is in or not; none at the end."""
        if self._again:
            size = len(self._again) if size < 0 else size
            block, self._again = self._again[:size], self._again[size:]
        else:
            block = self._next(size)
        self._place += len(block)
        self._kept.append(block)
        self.forget(self._place - max(MOST_BYTES, len(block)))
        return block

    def _next(self, size: int) -> bytes:
        try:
            return b"" if self.failure is not None else self._stream.read1(size)
        except self._damage as error:
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

    def forget(self, place: int) -> None:
        """Nothing in front of this place is needed any more, such as the start of a record."""
        while self._kept and self._first + len(self._kept[0]) <= place:
            self._first += len(self._kept.popleft())

    def end_of(self, start: int) -> int | None:
        """Where the record at `start` ends by its header; None if its length is none, no line ends follow it, or it is
        no longer kept."""
        data = self._since(start)
        header = _HEADER_END.search(data)
        length = _LENGTH.search(data, 0, header.end()) if header else None
        if header is None or length is None:
            return None
        end = header.end() + int(length[1])
        found = _SEPARATOR.match(data, end) if end <= len(data) else None
        return start + found.end() if found else None

    def go_on(self, place: int) -> bool:
        """Goes to the first record that begins behind `place`, which is kept. False: there is none."""
        place = max(place, self._first)
        data = self._since(place)
        while not (found := _BEGIN.search(data)):
            if not (block := self.read(2**20)):
                return False
            seen = max(len(data) - OVERLAP, 0)
            place, data = place + seen, data[seen:] + block
        start = found.start() + 1
        self._again = data[start:] + self._again
        self._kept.clear()
        self._first = self._place = place + start
        return True

    def _since(self, place: int) -> bytes:
        return b"".join(self._kept)[place - self._first :] if place >= self._first else b""
