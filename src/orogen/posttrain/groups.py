"""The groups of a batch of rollouts: tasks drawn, answered by an engine, and judged."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orogen.config.run import RunConfig
from orogen.posttrain.advantages import advantages, length_bonus, overlong_penalty
from orogen.posttrain.curriculum import Curriculum
from orogen.posttrain.measures import is_flat
from orogen.posttrain.rollout import Answering, Draw, Rollouts
from orogen.posttrain.samples import Sample


@dataclasses.dataclass
class Written:
    """A batch of rollouts. measures: counts and times of its making; calls that were sent to a server again are counted
    with the batch after them. curriculum: the curriculum's position after it."""

    samples: list[Sample]
    measures: dict[str, float]
    curriculum: dict[str, Any]


class Groups:
    """Writes the batches of rollouts of a run, in order. All randomness derives from the seed, the number of the batch
    and the place in it. tasks: by environment, the numbers of those to train on."""

    def __init__(self, config: RunConfig, rollouts: Rollouts, tasks: Mapping[str, Sequence[int]]) -> None:
        self._config, self._rl, self._rollouts, self._tasks = config, config.rl, rollouts, tasks
        self.curriculum = Curriculum(self._rl, tasks, seed=config.train.seed, steps=batches_of(config))

    def write(self, number: int, engine: Answering, progress: Callable[[], None]) -> Written:
        """Batch `number`, by the weights that the engine has. progress: called on the way."""
        began, spent = time.perf_counter(), self._rollouts.spent
        before = spent.writing, spent.verifying, spent.tokens
        faults = collections.Counter(self._rollouts.faults)
        if self.curriculum.profile_due(number):
            self.curriculum.profiled(self._profile(number, engine, progress))
        samples, resampled = self._groups(number, engine, progress)
        server = self._rollouts.server
        measures = {} if server is None else {"server_retries": float(server.retries())}
        measures |= {
            "resampled_groups": float(resampled),
            **_named_faults(collections.Counter(self._rollouts.faults) - faults),
            "rollout_ms": 1e3 * (spent.writing - before[0]),
            "verify_ms": 1e3 * (spent.verifying - before[1]),
            "rollout_tokens_per_second": (spent.tokens - before[2]) / max(time.perf_counter() - began, 1e-9),
        }
        return Written(samples, measures, self.curriculum.state())

    def _groups(self, number: int, engine: Answering, progress: Callable[[], None]) -> tuple[list[Sample], int]:
        """The judged samples of the batch's tasks, and how many groups were replaced because they had no gradient.
        Those of an environment with a teacher learn from it, whatever their rewards are."""
        taught = {one.name for one in self._rl.environments if one.teacher is not None}
        write = functools.partial(self._write, number=number, engine=engine, progress=progress)
        samples = write(self.curriculum.draw(number), round_=0)
        replaced = 0
        for round_ in range(1, int(self._rl.chosen("resample")) + 1):
            groups = by_group(samples)
            dull = [
                place for place, group in enumerate(groups) if group[0].environment not in taught and is_flat(group)
            ]
            if not dull:
                break
            names = [groups[place][0].environment for place in dull]
            again = [(name, self.curriculum.more(name, 1, number)[0]) for name in names]
            fresh = by_group(write(again, round_=round_))
            for place, group in zip(dull, fresh, strict=True):
                if not is_flat(group):
                    for sample in group:
                        sample.group = place
                    groups[place] = group
                    replaced += 1
            samples = sum(groups, [])
        return samples, replaced

    def _write(
        self, drawn: Sequence[tuple[str, int]], *, number: int, round_: int, engine: Answering,
        progress: Callable[[], None],
    ) -> list[Sample]:  # fmt: skip
        seed = self._config.train.seed
        draws = [
            Draw(name, task, group, (seed, number, round_, group, sample))
            for group, (name, task) in enumerate(drawn)
            for sample in range(self._rl.samples)
        ]
        samples = self._sampled(draws, engine, progress)
        for group in by_group(samples):
            self._judge(group)
        return samples

    def _sampled(self, draws: Sequence[Draw], engine: Answering, progress: Callable[[], None]) -> list[Sample]:
        return self._rollouts.write(draws, engine, temperature=self._rl.temperature, progress=progress)

    def _profile(self, rollout: int, engine: Answering, progress: Callable[[], None]) -> dict[str, list[float]]:
        """The mean reward, from 0 to 1, of each task; a sample whose verifier failed counts as 0."""
        found = {}
        for name, numbers in self._tasks.items():
            draws = [
                Draw(name, int(number), place, (self._config.train.seed, "profile", rollout, number, sample))
                for place, number in enumerate(numbers)
                for sample in range(self._rl.profile_samples)
            ]
            groups = by_group(self._sampled(draws, engine, progress))
            means = (np.nan_to_num(_rewards(group), nan=0.0).mean() for group in groups)
            found[name] = [float(np.clip(mean, 0, 1)) for mean in means]
        return found

    def _judge(self, group: Sequence[Sample]) -> None:
        """The advantages of a group, from rewards with what is added for their lengths."""
        rl, reward_n = self._rl, _rewards(group)
        if rl.chosen("overlong") == "penalty":
            settings = {"most": rl.max_tokens, "buffer": rl.overlong_buffer, "penalty": rl.overlong_penalty}
            reward_n = reward_n + [overlong_penalty(sample.longest, **settings) for sample in group]
        if rl.length_control or rl.concise_bonus:
            sizes = [np.array([sample.sizes[part] for sample in group]) for part in (0, 1)]
            settings = {"weight": rl.length_control, "concise": rl.concise_bonus}
            reward_n = reward_n + length_bonus(reward_n, sizes, **settings)
        found_n = advantages(
            reward_n, baseline=rl.baseline, normalise=rl.normalise, clip=rl.advantage_clip
        )  # fmt: skip
        for sample, value in zip(group, found_n, strict=True):
            sample.advantage = float(value)


def batches_of(config: RunConfig) -> int:
    """How many batches of rollouts a run has."""
    return -(-config.train.steps // config.rl.updates)


def _named_faults(faults: Mapping[str, int]) -> dict[str, float]:
    return {f"faults/{kind}": float(count) for kind, count in sorted(faults.items())}


def _rewards(group: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.reward for sample in group], np.float64)


def by_group(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples of each group, in the order of the groups."""
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.group, []).append(sample)
    return [found[group] for group in sorted(found)]
