"""Evaluating a run on tasks while it trains: scores of the held-out text, and every so many steps those of tasks."""

import dataclasses
from collections.abc import Callable
from typing import Any

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.run import RunConfig
from orogen.data.loader import Corpus
from orogen.evaluate.run import Evaluator
from orogen.evaluate.subject import Subject
from orogen.infer.generate import SHORTEST
from orogen.infer.sizes import sizes_of
from orogen.model.lm import Built
from orogen.parallel import distributed
from orogen.report.tasks import PREFIX
from orogen.train.heldout import at_work, heldout_plan
from orogen.train.task import Evaluation, Task

SLOTS = 8  # requests that are continued together, at least


def with_tasks(task: Task) -> Task:
    """The training task, evaluated on the run's EvaluateConfig too, which its config must have."""

    def evaluation(config: RunConfig, built: Built, corpus: Corpus) -> "TaskScores":
        heldout = task.evaluation(config, built, corpus)
        if heldout is None:
            raise ConfigError("EvaluateConfig evaluates together with the held-out text; expected a split with some")
        return TaskScores(heldout, config, built, corpus)

    return dataclasses.replace(task, evaluation=evaluation)


class TaskScores:
    """Scores the held-out split, as `Heldout` does, and the tasks of `config.evaluate`.

    Raises ConfigError for tasks that nobody has, and for those that generate text on a plan that cannot: with stages,
    or with a context whose layers exchange in another way than an engine's.
    """

    def __init__(self, heldout: Evaluation, config: RunConfig, built: Built, corpus: Corpus):
        self._heldout, self._steps = heldout, config.train.steps
        self._every = config.evaluate.every or config.train.evaluate_every
        # Without those of tasks, which not every evaluation has: the loop asks whether an evaluation is owed.
        self.sampled, self.whole = heldout.sampled, heldout.whole
        self._evaluator = Evaluator(config.evaluate)
        plan, engine = heldout_plan(config), _engine(config)
        if self._evaluator.writes:
            sizes_of(config.model, plan.config, engine)
            if distributed.count() > 1:
                raise ConfigError("EvaluateConfig.tasks generate text; expected a run of one process for these")
        opened = Opened(config.model, plan, built, built.params, built.buffers, corpus.tokenizer.as_in_training())
        self._subject = Subject(opened, config.evaluate, engine)

    @property
    def progress(self) -> Callable[[], None]:
        """Called after every batch."""
        return self._heldout.progress

    @progress.setter
    def progress(self, call: Callable[[], None]) -> None:
        self._heldout.progress = self._subject.progress = call

    def sample(self, state: Any) -> dict[str, float]:
        """Those of the held-out text, and in the steps that are due those of tasks, named evaluate/TASK/METRIC."""
        scores, step = self._heldout.sample(state), int(state.step)
        if step % self._every == 0 or step == self._steps:
            scores |= self._tasks(state)
        return scores

    def full(self, state: Any) -> dict[str, float]:
        """Those of the whole held-out split."""
        return self._heldout.full(state)

    def _tasks(self, state: Any) -> dict[str, float]:
        subject = self._subject
        subject.give(at_work(state.params, subject.opened.plan), state.buffers)
        try:
            results = self._evaluator.run(subject)
        finally:
            subject.release()
        return {f"{PREFIX}{task}/{name}": value for task, metrics in results.items() for name, value in metrics.items()}


def _engine(config: RunConfig) -> EngineConfig:
    """Layers that repeat are compiled once, since the programs serve one evaluation."""
    unit = config.plan.data * config.plan.context * config.plan.tensor
    return EngineConfig(
        slots=-(-SLOTS // unit) * unit, max_length=SHORTEST, prefix_cache=False, written_out=False,
        compute_dtype=config.train.compute_dtype,
    )  # fmt: skip
