"""How the write of a checkpoint ended, which all processes of a run see alike."""

import contextlib
import os
import re
from collections.abc import Iterator

from orogen.parallel import distributed

FAILED = -1  # settled in place of the step


class ElsewhereError(RuntimeError):
    """Another process could not do its part of a write."""


@contextlib.contextmanager
def shared(done: str, step: int) -> Iterator[None]:
    """Around each process's part of the write of checkpoint `step`; that of the first completes it. However a part
    ends, the others learn it through `done`, a name that all have: ElsewhereError is raised if another one failed."""
    if distributed.count() == 1:
        yield
        return
    ended = FAILED
    try:
        yield
        ended = step
    finally:
        if distributed.first() or ended == FAILED:
            distributed.propose(done, ended)
    if distributed.wait_until_settled(done) == FAILED:
        raise ElsewhereError("another process could not do its part")


def failed(done: str) -> None:
    """This process could not begin its part."""
    if distributed.count() > 1:
        distributed.propose(done, FAILED)


def reason(error: Exception) -> str:
    """Why a write failed, in a few words. tensorstore states the system's error by its number, in a long text."""
    if isinstance(error, ElsewhereError):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os_error_code='(\d+)'", str(error))):
        number = int(found[1])
    return os.strerror(number) if number else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
