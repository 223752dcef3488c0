"""The mean reward on held-out tasks, for which the most likely tokens are written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orogen.config.streams import say
from orogen.posttrain.rollout import Answering, Draw, Rollouts

WAIT = 1.0  # seconds between two looks at whether a thread makes progress
REWARD, FAILURE, WHOLE = "heldout_reward", "heldout_failure", "whole_"


class HeldoutTasks:
    """Scores a state by its rewards on held-out tasks: about `count` of them, or all.

    The first score is 1 - reward, since of scores the lowest is the best. A failed verification has a reward of 0.
    repeated: environments with so few questions that held-out ones are trained on too, which is said once.
    """

    def __init__(
        self, rollouts: Rollouts, tasks: Mapping[str, Sequence[int]], *, count: int, repeated: Sequence[str] = ()
    ) -> None:  # fmt: skip
        self._rollouts, self._repeated = rollouts, repeated
        self._all = {name: list(numbers) for name, numbers in tasks.items() if len(numbers)}
        per_environment = -(-count // max(1, len(self._all)))
        self._some = {name: _spread(numbers, per_environment) for name, numbers in self._all.items()}
        names = [f"{REWARD}/{name}" for name in self._all]
        self.sampled = (FAILURE, REWARD, *names)
        self.whole = tuple(WHOLE + name for name in self.sampled)
        self.progress: Callable[[], None] = lambda: None

    def sample(self, state: Any) -> dict[str, float]:
        """The scores on about `count` tasks."""
        return self._scores(state, self._some, self.sampled)

    def full(self, state: Any) -> dict[str, float]:
        """The scores on all held-out tasks."""
        return self._scores(state, self._all, self.whole)

    def _scores(self, state: Any, tasks: Mapping[str, Sequence[int]], names: Sequence[str]) -> dict[str, float]:
        if self._repeated:
            names_of = ", ".join(self._repeated)
            say(f"held-out tasks of {names_of} repeat questions of training: they have too few different ones")
            self._repeated = ()
        self._acquire()
        try:
            engine = self._rollouts.take(state.params, state.buffers, self.progress)
            means = self._means(engine, tasks)
        finally:
            self._rollouts.lock.release()
        reward = float(np.mean(means))
        return dict(zip(names, [1 - reward, reward, *means], strict=True))

    def _acquire(self) -> None:
        """Waits until a thread that writes ahead is done with its batch: progress, as long as it makes any."""
        seen = self._rollouts.rounds
        while not self._rollouts.lock.acquire(timeout=WAIT):
            if self._rollouts.rounds != seen:
                seen = self._rollouts.rounds
                self.progress()

    def _means(self, engine: Answering, tasks: Mapping[str, Sequence[int]]) -> list[float]:
        """The mean reward of each environment."""
        means = []
        for name, numbers in tasks.items():
            draws = [Draw(name, int(number), place, ("heldout",)) for place, number in enumerate(numbers)]
            samples = self._rollouts.write(draws, engine, temperature=0.0, progress=self.progress)
            means.append(float(np.mean(np.nan_to_num([sample.reward for sample in samples], nan=0.0))))
        return means


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """About `count` of them, evenly spread."""
    count = min(count, len(numbers))
    return [numbers[place * len(numbers) // count] for place in range(count)]
