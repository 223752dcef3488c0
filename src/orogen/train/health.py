"""Detects bad steps: those that were skipped, and those whose loss is far above the losses before."""

import collections
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from orogen.config.run import TrainConfig
from orogen.parallel import distributed

# A normal distribution's standard deviation over its median absolute deviation (doi:10.1080/01621459.1993.10476408).
DEVIATION = 1.4826
SPIKE = "spike_bound"


class NonFiniteError(RuntimeError):
    """Too many bad steps: skipped because a loss or gradient was not finite or a buffer overflowed, or spikes."""


class Health:
    """Judges each step by the records of the steps before it alone, so that a resumed run, which reads them from
    metrics.jsonl, judges like an uninterrupted one.

    A loss is a spike if it exceeds median + spike_deviations · 1.4826 · MAD of the losses of the last `spike_window`
    good steps, where MAD is their median absolute deviation from the median; both ignore outliers
    (doi:10.1016/j.jesp.2013.03.013). Until there are that many, no loss is a spike.

    records: of the steps so far; with several processes, those of the first one count for all.
    """

    def __init__(self, train: TrainConfig, records: Iterable[Mapping[str, Any]] = ()):
        self._deviations = train.spike_deviations
        self._losses: collections.deque[float] = collections.deque(maxlen=train.spike_window)
        self._skipped = self.bad_in_row = 0
        for record in records:
            self._add(record)
        read = distributed.from_first(lambda: [list(self._losses), self._skipped, self.bad_in_row])
        self._losses, (self._skipped, self.bad_in_row) = collections.deque(read[0], train.spike_window), read[1:]

    @property
    def bound(self) -> float | None:
        """The loss above which the next step is a spike; None while there is no bound."""
        if not self._deviations or len(self._losses) < (self._losses.maxlen or 0):
            return None
        middle = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - middle) for loss in self._losses)
        # If most losses are equal, the bound would be their value, and a difference in the last bit would be a spike.
        return middle + self._deviations * DEVIATION * deviation if deviation else None

    def judged(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of the next step, with the bound under the key `spike_bound` if its loss is a spike."""
        bound = self.bound
        if bound is not None and record["objective"] > bound:
            record = record | {SPIKE: bound}
        self._add(record)
        return record

    def _add(self, record: Mapping[str, Any]) -> None:
        skipped = record.get("skipped_steps", 0)
        if skipped > self._skipped or SPIKE in record:
            self.bad_in_row += 1
        else:
            self.bad_in_row = 0
            self._losses.append(record["objective"])  # finite, or the step would have been skipped
        self._skipped = skipped
