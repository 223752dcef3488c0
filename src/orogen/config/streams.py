"""Output that outlives its terminal: a run whose terminal or pipe is closed still saves."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)  # errors of a closed pipe and of a closed terminal
FULL = (errno.ENOSPC, errno.EDQUOT)


class _Lasting:
    """A text stream that switches to /dev/null, file descriptor included, once its reader is gone.

    lost_if: errors that lose only the text being written. A full disk must not end a run whose progress is written
    there, but it must end a command whose answer on stdout would be lost.
    """

    def __init__(self, stream: TextIO, *, lost_if: tuple[int, ...] = ()):
        self._stream, self._lost_if = stream, lost_if

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
            if error.errno in GONE:
                self._redirect()
            elif error.errno not in self._lost_if:
                raise

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
    """Prints a line on stderr. It is lost if the terminal is closed, if the process has no stderr, or if that is a file
    on a full disk."""
    if sys.stderr is not None:
        lasting = _Lasting(sys.stderr, lost_if=FULL)
        lasting.write(line + "\n")
        lasting.flush()


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Makes stdout and stderr outlive their readers, while the body runs and when their buffers are flushed at exit."""
    before = sys.stdout, sys.stderr
    stdout, stderr = (stream or open(os.devnull, "w") for stream in before)
    lasting = [_Lasting(stdout), _Lasting(stderr, lost_if=FULL)]
    sys.stdout, sys.stderr = lasting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in lasting:
            stream.flush()
