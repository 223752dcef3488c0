"""When a run writes a checkpoint: every so many steps or minutes, and after the best evaluation so far."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from orogen.checkpoint.steps import Checkpoints, NotSavedError
from orogen.config.run import TrainConfig
from orogen.model.layout import Layout
from orogen.parallel import distributed
from orogen.report.lost import SAVING
from orogen.train.goodput import Clock
from orogen.train.state import TrainState, items

# With several processes, the steps between checks whether the minutes have passed: each check costs a broadcast.
STEPS_BETWEEN_CLOCKS = 10


class Saver:
    """Writes the checkpoints of a run. score: the name of the held-out score whose lowest value is the best; None:
    there is none."""

    def __init__(
        self,
        train: TrainConfig,
        checkpoints: Checkpoints,
        *,
        score: str | None,
        clock: Clock,
        log: Callable[[str], None],
    ):
        self._train, self._checkpoints, self._clock, self._log = train, checkpoints, clock, log
        self._score = score if train.keep_best else None
        self._scores: dict[int, float] = {}

    def start(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Call this before the run starts or continues after these records."""
        self._saved_at = time.monotonic()
        if (name := self._score) is not None:
            found = {record["step"]: record[name] for record in records if name in record}
            self._scores = {step: score for step, score in found.items() if math.isfinite(score)}
            there = [step for step in self._scores if self._checkpoints.has(step)]
            self._checkpoints.best = min(there, key=lambda step: self._scores[step], default=None)

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is due, whatever its evaluation will say."""
        return step % self._train.checkpoint_every == 0 or self._minutes_passed(step)

    def is_best(self, record: Mapping[str, Any]) -> bool:
        """Whether the record's score is lower than that of every checkpoint. The first process decides for all, so only
        it needs the records of `start`."""
        return distributed.from_first(lambda: self._is_best(record))

    def _is_best(self, record: Mapping[str, Any]) -> bool:
        name = self._score
        if name is None or name not in record or not math.isfinite(score := record[name]):
            return False
        self._scores[record["step"]] = score
        others = [s for step, s in self._scores.items() if step != record["step"] and self._checkpoints.has(step)]
        return all(score < other for other in others)

    def save(self, state: TrainState, position: dict[str, Any], layout: Layout, *, best: bool = False) -> None:
        """Starts writing the state and the data's position. Raises NotSavedError; a failure of the write before this
        one is only logged."""
        with self._clock.aside(SAVING):
            try:
                self._checkpoints.wait()
            except NotSavedError as error:
                self._log(f"{error}; training goes on")
            self._checkpoints.save(int(state.step), items(state), position, layout, best=best)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Waits for the last write. Raises NotSavedError."""
        with self._clock.aside(SAVING):
            self._checkpoints.wait()

    def save_on_the_way(self, state: TrainState, position: dict[str, Any], layout: Layout, *, best: bool) -> None:
        """`save`, after which training goes on even if it fails: there may be room on the disk for a later one."""
        try:
            self.save(state, position, layout, best=best)
        except NotSavedError as error:
            self._log(f"{error}; training goes on")

    def _minutes_passed(self, step: int) -> bool:
        if not self._train.checkpoint_minutes:
            return False
        passed = time.monotonic() - self._saved_at >= 60 * self._train.checkpoint_minutes
        if jax.process_count() == 1:
            return passed
        # All processes write a checkpoint, or none: the clock of the first one counts.
        if step % STEPS_BETWEEN_CLOCKS:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(passed)))
