"""Notices a run that hangs, such as in a collective that one process never joins, and ends it."""

import faulthandler
import os
import statistics
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from orogen.config.streams import say

# A run is hung after this many times its usual step.
USUAL_STEPS = 10
# What may compile first or write to a slow disk may take this many times `hang_minutes`.
LONGER = 6
KEPT_STEPS = 100
EXIT_STATUS = 1


class Watch:
    """Ends the process with status 1 if `progress` has not been called for too long. Use as a context manager.

    The limit is `minutes`, or ten times the median of the last steps if that is longer; six times `minutes` after
    `expect_longer`. Stack traces of all Python threads are then written to `hang.PROCESS.txt` in the run folder. Time
    during which the process was stopped or the machine slept does not count. Every process watches itself: when one
    ends, its launcher ends the others.

    minutes: 0 watches nothing. process: the index of this process. log: gets one line before the end. end: for tests.
    """

    def __init__(
        self,
        run_dir: Path,
        minutes: float,
        *,
        process: int,
        log: Callable[[str], None] = say,
        tick_seconds: float = 1.0,
        end: Callable[[int], None] = os._exit,
    ):
        self.path = run_dir / f"hang.{process}.txt"
        self._process, self._minutes, self._log, self._end, self._tick = process, minutes, log, end, tick_seconds
        self._steps: deque[float] = deque(maxlen=KEPT_STEPS)
        self._count = 0  # of calls; only the run's own thread writes it, and only the watching thread reads it
        self._longer = 1
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def __enter__(self) -> "Watch":
        if self._minutes:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._minutes:
            self._thread.join()

    @property
    def limit(self) -> float:
        """The seconds without progress after which the run counts as hung."""
        usual = USUAL_STEPS * statistics.median(self._steps) if self._steps else 0.0
        return max(60 * self._minutes * self._longer, usual)

    def progress(self, step_seconds: float | None = None) -> None:
        """Call this after a step, with the seconds that it took, or after a part of an evaluation."""
        if step_seconds is not None:
            self._steps.append(step_seconds)
        self._longer = 1
        self._count += 1

    def expect_longer(self) -> None:
        """Call this before work that may compile first, or that writes to a slow disk."""
        self._longer = LONGER
        self._count += 1

    def _watch(self) -> None:
        # Ticks are counted, not the clock: a process that was stopped for an hour has not hung for an hour.
        seen, quiet = self._count, 0.0
        while not self._over.wait(self._tick):
            quiet = quiet + self._tick if self._count == seen else 0.0
            seen, limit = self._count, self.limit
            if quiet >= limit:
                return self._hung(limit)

    def _hung(self, limit: float) -> None:
        try:
            with self.path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            traces = f"stack traces are in {self.path}"
        except OSError as error:
            traces = f"stack traces could not be written to {self.path} ({error.strerror})"
        self._log(f"process {self._process} hangs: no step for {limit:.0f} s; {traces}; it ends, --resume continues")
        self._end(EXIT_STATUS)
