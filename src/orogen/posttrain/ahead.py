"""Batches of rollouts that a thread writes while the trainer updates (asynchronous RL, arXiv:2505.24298).

The thread may begin batch m once the weights that batch m - n trains are there, n being `RLConfig.staleness`, so no
token is of weights more than n batches old. Newer weights are handed over between two calls of the engine, in the midst
of answers. What is unfinished when a run ends is lost, and written again, with newer weights, by the run that goes on:
positions never contain it, so no sample counts twice.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from orogen.posttrain.groups import Groups, Written
from orogen.posttrain.rollout import Rollouts, Weights

WAIT = 1.0  # seconds between two looks at whether the thread is alive


class _Closed(Exception):
    """The thread is to end now."""


class _Newest(NamedTuple):
    weights: Weights
    version: int


class Ahead:
    """Writes batches of rollouts, at most `most` ahead of the one that trains. None from number `total` on, where a run
    usually ends, is written before it is taken: a run that rolled back takes more."""

    def __init__(self, rollouts: Rollouts, groups: Groups, *, most: int, total: int) -> None:
        self._rollouts, self._groups, self._most, self._total = rollouts, groups, most, total
        self._changed = threading.Condition()
        self._newest: _Newest | None = None
        self._given = -1  # the version that the engine has
        self._allowed = -1
        self._found: dict[int, Written] = {}
        self._error: BaseException | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        rollouts.on_close(self.stop)

    def take(self, number: int, params: Any, buffers: Any, progress: Callable[[], None]) -> Written:
        """Batch `number`, of which each call takes the next one. Hands over the weights, which are copied, and waits.
        Raises what the thread raised."""
        newest = _Newest(self._rollouts.copied(params, buffers), number)
        with self._changed:
            self._newest = newest
            self._allowed = max(number, min(number + self._most, self._total - 1))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, args=(number,), name="rollouts", daemon=True)
                self._thread.start()
            thread = self._thread
            self._changed.notify_all()
            seen = self._rollouts.rounds
            while number not in self._found and self._error is None:
                if not thread.is_alive():
                    raise RuntimeError(f"the thread of rollouts has ended; expected it to write batch {number}")
                self._changed.wait(WAIT)
                if self._rollouts.rounds != seen:
                    seen = self._rollouts.rounds
                    progress()
            if self._error is not None:
                raise self._error
            return self._found.pop(number)

    def stop(self) -> None:
        """Ends the thread after its call of the engine, or while a server is waited for, and forgets what it has
        written."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._closing, self._error = None, False, None
        self._found.clear()

    # The thread.

    def _run(self, number: int) -> None:
        try:
            while self._may_begin(number):
                with self._rollouts.lock:
                    newest = self._latest()
                    engine = self._rollouts.given(newest.weights, version=newest.version, progress=self._look)
                    self._given = newest.version
                    written = self._groups.write(number, engine, self._between)
                with self._changed:
                    self._found[number] = written
                    self._changed.notify_all()
                number += 1
        except _Closed:
            self._rollouts.forget()  # it is in the midst of requests
        except BaseException as error:  # raised where the batch is waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _may_begin(self, number: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or number <= self._allowed)
            return not self._closing

    def _latest(self) -> _Newest:
        with self._changed:
            assert self._newest is not None
            return self._newest

    def _look(self) -> None:
        """Tells the trainer that the thread goes on. Raises _Closed if it is not to."""
        if self._closing:
            raise _Closed
        self._rollouts.rounds += 1

    def _between(self) -> None:
        """What happens between two calls of the engine."""
        self._look()
        newest = self._latest()
        if newest.version != self._given:
            self._rollouts.swap(newest.weights, version=newest.version, progress=self._look)
            self._given = newest.version
