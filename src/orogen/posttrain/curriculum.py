"""Which tasks a batch of rollouts has: fixed shares of environments, and tasks by epochs or by their pass rate.

Letters: n tasks of an environment.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orogen.config.rl import RLConfig

ALWAYS = 1.0  # the pass rate of a task that teaches nothing more


def split_prompts(prompts: int, shares: Sequence[float]) -> list[int]:
    """How many prompts each environment has: its share, rounded so that they add up (largest remainders), and at least
    one."""
    exact = np.array(shares) / sum(shares) * prompts
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() < prompts:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > prompts:
        over = np.where(counts > 1, exact - counts, np.inf)
        counts[np.argmin(over)] -= 1
    return counts.tolist()


def gaussian(pass_rate_n: np.ndarray, *, mean: float, width: float) -> np.ndarray:
    """The probability (n,) of drawing each task: exp(-(p - mean)² / 2 width²), 0 for one that always passes.

    All are equal if every task always passes. Source: Nemotron 3 Nano report, section 3.2.
    """
    left_n = pass_rate_n < ALWAYS
    if not left_n.any():
        return np.full(len(pass_rate_n), 1 / len(pass_rate_n))
    exponent_n = np.where(left_n, -np.square(pass_rate_n - mean) / (2 * width**2), -np.inf)
    weight_n = np.exp(exponent_n - exponent_n.max())
    return weight_n / weight_n.sum()


class Curriculum:
    """Draws tasks. The position is plain JSON, and the next draw depends on it and the seed alone.

    tasks: by environment, the numbers of those to train on. steps: batches of rollouts of the whole run.
    """

    def __init__(self, rl: RLConfig, tasks: Mapping[str, Sequence[int]], *, seed: int, steps: int) -> None:
        self._rl, self._seed, self._steps = rl, seed, steps
        self._tasks = {name: np.asarray(numbers) for name, numbers in tasks.items()}
        self._drawn = dict.fromkeys(tasks, 0)
        self._rates: dict[str, list[float]] = {}
        self._order: tuple[tuple[str, int], np.ndarray] | None = None

    @property
    def rates(self) -> dict[str, list[float]]:
        """The pass rates of the last profile, by environment, in the order of its tasks; empty before."""
        return self._rates

    def profile_due(self, rollout: int) -> bool:
        """Whether tasks are profiled before this batch of rollouts."""
        every = self._rl.profile_every
        again = every > 0 and rollout > 0 and rollout % every == 0
        return self._rl.curriculum == "gaussian" and (not self._rates or again)

    def profiled(self, rates: Mapping[str, Sequence[float]]) -> None:
        """Takes the pass rates of all tasks."""
        self._rates = {name: [float(rate) for rate in found] for name, found in rates.items()}

    def draw(self, rollout: int) -> list[tuple[str, int]]:
        """Environment and number of each task of a batch, in an order that mixes environments."""
        shares = [one.share for one in self._rl.environments]
        counts = split_prompts(self._rl.prompts, shares)
        found = [
            (one.name, number)
            for one, count in zip(self._rl.environments, counts, strict=True)
            for number in self.more(one.name, count, rollout)
        ]
        order = np.random.default_rng([self._seed, rollout]).permutation(len(found))
        return [found[place] for place in order]

    def more(self, name: str, count: int, rollout: int) -> list[int]:
        """The numbers of `count` further tasks of one environment."""
        tasks, first = self._tasks[name], self._drawn[name]
        self._drawn[name] += count
        if self._rl.curriculum == "gaussian":
            return self._by_rate(name, count, rollout, first)
        indices = [(first + k) // len(tasks) for k in range(count)], [(first + k) % len(tasks) for k in range(count)]
        return [int(tasks[self._shuffled(name, epoch)[place]]) for epoch, place in zip(*indices, strict=True)]

    def _shuffled(self, name: str, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != (name, epoch):
            rng = np.random.default_rng([self._seed, self._number(name), epoch])
            self._order = (name, epoch), rng.permutation(len(self._tasks[name]))
        return self._order[1]

    def _by_rate(self, name: str, count: int, rollout: int, first: int) -> list[int]:
        rl, tasks = self._rl, self._tasks[name]
        mean = self.mean_rate(rollout)
        chance_n = gaussian(np.array(self._rates[name]), mean=mean, width=rl.curriculum_width)
        rng = np.random.default_rng([self._seed, self._number(name), rollout, first])
        enough = np.count_nonzero(chance_n) >= count
        indices = rng.choice(len(tasks), size=count, replace=not enough, p=chance_n)
        return [int(number) for number in tasks[indices]]

    def mean_rate(self, rollout: int) -> float:
        """The pass rate that is drawn most: it goes linearly from curriculum_start to curriculum_end."""
        done = min(1.0, rollout / max(1, self._steps - 1))
        return self._rl.curriculum_start + (self._rl.curriculum_end - self._rl.curriculum_start) * done

    def _number(self, name: str) -> int:
        return [one.name for one in self._rl.environments].index(name)

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON."""
        return {"drawn": dict(self._drawn), "rates": self._rates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was saved."""
        self._drawn, self._rates = dict(state["drawn"]), dict(state["rates"])
