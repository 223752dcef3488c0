"""Output that outlives its terminal: a run whose terminal or pipe is closed still saves."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)  # errors of a closed pipe and of a closed terminal


class _Lasting:
    """A text stream that switches to /dev/null, file descriptor included, once its reader is gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._dropped_if_gone():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropped_if_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropped_if_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # another error, such as a full disk's, loses output that someone would want
            if error.errno not in GONE:
                raise
            self._redirect()

    def _redirect(self) -> None:
        """Redirects the stream's file descriptor, if it has one, to /dev/null."""
        try:
            own = self._stream.fileno()
        except (OSError, ValueError):  # a stream in memory, or a closed one
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, own)
        os.close(nowhere)


def say(line: str) -> None:
    """Prints a line on stderr. It is lost if the terminal is closed, or if the process has no stderr."""
    if sys.stderr is not None:
        _Lasting(sys.stderr).write(line + "\n")
        _Lasting(sys.stderr).flush()


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Makes stdout and stderr outlive their readers, while the body runs and when their buffers are flushed at exit."""
    before = sys.stdout, sys.stderr
    lasting = [_Lasting(stream or open(os.devnull, "w")) for stream in before]
    sys.stdout, sys.stderr = lasting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in lasting:
            stream.flush()
