"""Everything that a config asks of a model, and what comes of it by task and metric."""

from collections.abc import Iterator

from orogen.config.evaluate import WRITTEN, EvaluateConfig
from orogen.evaluate.harness import Harness, harness_of
from orogen.evaluate.perplexity import measure_text
from orogen.evaluate.subject import Subject
from orogen.evaluate.suites.run import run_suites

Results = dict[str, dict[str, float]]


class Evaluator:
    """What a config asks for, checked before a model is read. Raises ConfigError for tasks that nobody has."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self._harness: Harness | None = harness_of(config)

    @property
    def suites(self) -> tuple[str, ...]:
        """The tasks that are generated: a folder's task of the same name comes first."""
        theirs = () if self._harness is None else self._harness.tasks
        return tuple(task for task in self.config.generated if task not in theirs)

    @property
    def writes(self) -> bool:
        """Whether a task generates text."""
        return bool(set(self.suites) & set(WRITTEN)) or (self._harness is not None and self._harness.writes)

    def run(self, subject: Subject) -> Results:
        """The metrics by task; those of a text are under its path."""
        return {task: metrics for part in self.parts(subject) for task, metrics in part.items()}

    def parts(self, subject: Subject) -> Iterator[Results]:
        """The results as they become known: generated tasks, those of lm-eval, then each text. A part that raises does
        not take back the parts before it."""
        if self.suites:
            yield run_suites(subject, self.suites)
        if self._harness is not None:
            yield self._harness.run(subject)
        for path in self.config.texts:
            yield {path: measure_text(subject, path)}
