"""Output that outlives its terminal: a run whose terminal or pipe is closed goes on to save."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class _Lasting:
    """A text stream that turns to /dev/null, its file descriptor too, once nobody can read it any more."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._lost_is_lost():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lost_is_lost():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _lost_is_lost(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """stdout and stderr that raise nothing while the body runs, nor when what they hold is flushed at exit."""
    before = sys.stdout, sys.stderr
    lasting = [_Lasting(stream or open(os.devnull, "w")) for stream in before]
    sys.stdout, sys.stderr = lasting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before
