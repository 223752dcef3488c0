"""How the time of a run is spent: on its steps, and on everything between them."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from orogen.report.lost import STARTING


class Clock:
    """Splits the time between the ends of two steps into the step itself and other work (`aside`).

    It starts when it is constructed. All times are host times in seconds.
    """

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._aside = 0.0
        self._spent: dict[str, float] = {}

    def start(self) -> None:
        """The first step is about to begin: all time so far was spent on starting."""
        now = time.perf_counter()
        self._spent = {STARTING: now - self._since - self._aside, **self._spent}
        self._since, self._aside = now, 0.0

    @contextlib.contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Counts the time of the body as `kind` and not as the step's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._aside += seconds
            self._spent[kind] = self._spent.get(kind, 0.0) + seconds

    def step(self, done: float) -> float:
        """The duration of the step that ended at `done`, by `time.perf_counter`."""
        seconds = done - self._since - self._aside
        self._since, self._aside = done, 0.0
        return seconds

    def spent(self, record: Mapping[str, Any] | None = None) -> dict[str, float]:
        """The seconds spent aside since the last call, by kind. record: a step's record, whose seconds are added."""
        found, self._spent = self._spent, {}
        return {kind: seconds + (record or {}).get(kind, 0.0) for kind, seconds in found.items()}
