"""How a run stops on a signal: SIGTERM, Ctrl-C (SIGINT), or a terminal that closes (SIGHUP).

A run of several processes stops after one step on all of them, whichever of them got the signal.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from orogen.parallel import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells report for a process ended by Ctrl-C


T = TypeVar("T")


class StoppedEarlyError(BaseException):
    """A signal came while there was nothing to save. A BaseException, so that no handler of errors catches it.

    status: the exit status of the process.
    """

    def __init__(self, status: int):
        super().__init__()
        self.status = status


class _CutShortError(BaseException):
    """A signal came during work that can be repeated."""


class Stop:
    """A flag that signals set, so that a run can finish its step, save and exit. Use as a context manager.

    While `working` is False, there is nothing to save, and a signal raises StoppedEarlyError, though only after the
    compilation in progress. A second SIGINT calls `at_once` and ends the process. A signal that was ignored stays
    ignored, as SIGHUP is under nohup. If a signal arrives inside a finalizer or a callback of the garbage collector,
    where Python drops exceptions, it is sent again a moment later.

    alone: whether this process may end by itself. One of several may not, while the others wait for it: then a signal
    only sets the flag, for `StopTogether`.
    """

    def __init__(self) -> None:
        self.alone = distributed.count() == 1
        self.asked = self.working = self._cutting = False
        self.by: int | None = None
        self.at_once: Callable[[], None] = lambda: None
        self._interrupts = 0
        self._repeat: threading.Timer | None = None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, before in self._before.items():
            if before != signal.SIG_IGN:
                signal.signal(number, self._ask)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        return self

    def __exit__(self, *exception: object) -> None:
        if self._repeat is not None:  # `asked` and `by` hold what it would repeat
            self._repeat.cancel()
            self._repeat.join()
        sys.unraisablehook = self._unraisable
        for number, before in self._before.items():
            signal.signal(number, before)

    @property
    def status(self) -> int:
        """The exit status of a run that was asked to stop and did: 130 after Ctrl-C, else 0."""
        return INTERRUPTED if self.by == signal.SIGINT else 0

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """`work()`, or None if a signal came before its end and this process may act on it alone."""
        try:
            try:
                self._cutting = True
                return None if self.asked and self.alone else work()
            finally:
                self._cutting = False
        except _CutShortError:  # raised in `work` or between the lines above
            self._cutting = False
            return None

    def _dropped(self, dropped: Any) -> None:
        """The hook that Python calls for exceptions that it drops."""
        if not isinstance(dropped.exc_value, StoppedEarlyError | _CutShortError):
            return self._unraisable(dropped)
        self._repeat = threading.Timer(0.02, os.kill, (os.getpid(), self.by))
        self._repeat.daemon = True
        self._repeat.start()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        repeated, self._repeat = self._repeat, None
        if repeated is not None:
            repeated.cancel()
        self._interrupts += number == signal.SIGINT and repeated is None
        if self._interrupts > 1:
            self.at_once()
            try:  # past Python's buffers: the signal may have interrupted a write to them
                os.write(2, b"orogen: ended at once; what was not saved is lost\n")
            finally:
                os._exit(INTERRUPTED)
        first = not self.asked or repeated is not None
        self.asked, self.by = True, self.by or number
        if first and self._cutting and self.alone:
            raise _CutShortError
        if first and not self.working and self.alone:
            raise StoppedEarlyError(self.status)


class StopTogether:
    """The step after which a run stops on a signal: the same one on all of its processes.

    A process that received a signal before it dispatches step n proposes step n + 1 through the runtime's key-value
    store, unless a step has been settled already. Every process looks there once it has the metrics of step n. By then
    all processes have dispatched step n, so it sees every proposal made before that. The step itself gets no additional
    collective.
    """

    def __init__(self, stop: Stop):
        self._stop, self._name, self._proposed = stop, distributed.fresh_name("stop"), False

    def before(self, number: int) -> None:
        """Call this before step `number` is dispatched."""
        if self._stop.asked and not self._stop.alone and not self._proposed:
            distributed.propose(self._name, number + 1)
            self._proposed = True

    def after(self, number: int) -> bool:
        """Whether to stop after step `number`, which is dispatched. The metrics of the step before it have been read,
        unless it is the first of this call."""
        if self._stop.alone:
            return self._stop.asked
        last = distributed.settled(self._name)
        return last is not None and number >= last
