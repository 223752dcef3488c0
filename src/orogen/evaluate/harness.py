"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness 0.4.13), run in this process.

lm-eval builds the requests and computes the metrics; the model answers them through `harness_model.HarnessModel`.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.evaluate import SUITES, EvaluateConfig
from orogen.evaluate.subject import Subject

BOOTSTRAPS = 1000  # resamplings for standard errors that have no formula
NO_FILTER = ",none"  # what lm-eval appends to the name of a metric whose answers are not filtered


class Harness:
    """The tasks of lm-eval that a config names, or matches by * and ?. tasks: their names; writes: whether one of them
    generates text.

    Raises ConfigError if lm-eval is not installed, for folders that do not exist, for tasks that nobody has, and for
    those that cannot be loaded.
    """

    def __init__(self, config: EvaluateConfig):
        self._config = config
        require_installed()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each default that it takes
        for folder in config.task_path:
            if not os.path.isdir(folder):
                raise ConfigError(f"EvaluateConfig.task_path has {folder!r}; expected a folder that exists")
        with _beside_stdout():
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

            paths: Any = list(config.task_path)
            self._manager = TaskManager(include_path=paths or None, include_defaults=not paths)
            found = {task: self._manager.match_tasks([task]) for task in config.tasks}
            self.tasks = tuple(dict.fromkeys(name for names in found.values() for name in names))
        if unknown := [task for task, names in found.items() if not names and task not in SUITES]:
            where = f"in {', '.join(config.task_path)}" if config.task_path else "that lm-eval has"
            raise ConfigError(
                f"EvaluateConfig.tasks has {unknown[0]!r}; expected a generated suite ({', '.join(SUITES)}) or a task "
                f"{where}"
            )
        self.writes = bool(self.tasks) and self._load()

    def run(self, subject: Subject) -> dict[str, dict[str, float]]:
        """By task, and by group and subtask, the metrics by name; those after a filter are named `metric,filter`."""
        if not self.tasks:
            return {}
        from orogen.evaluate.harness_model import HarnessModel

        with _beside_stdout():
            from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

            model = HarnessModel(subject)
            found: Any = simple_evaluate(
                model, tasks=list(self.tasks), task_manager=self._manager, num_fewshot=self._config.shots,
                limit=self._config.limit, bootstrap_iters=BOOTSTRAPS, log_samples=False,
            )  # fmt: skip
        results = {task: metrics_of(entries) for task, entries in found["results"].items()}
        for task in results:
            results[task] |= model.facts(task)
        return results

    def _load(self) -> bool:
        """Reads the tasks' data once, before a model answers anything. Returns whether a task generates text."""
        with _beside_stdout():
            try:
                loaded: Any = self._manager.load(list(self.tasks))["tasks"]
                return any(task.OUTPUT_TYPE == "generate_until" for task in loaded.values())
            except Exception as error:  # a task's YAML, data or Python may fail in any way
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                names = ", ".join(self.tasks)
                raise ConfigError(f"lm-eval cannot load {names}: {reason}; expected whole tasks and data") from error


def harness_of(config: EvaluateConfig) -> Harness | None:
    """The harness that a config needs; None if all of its tasks are generated suites."""
    return Harness(config) if config.task_path or config.generated != config.tasks else None


def require_installed() -> None:
    """Raises ConfigError if lm-eval is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval not installed; expected what `pip install 'orogen[eval]'` installs")


def metrics_of(entries: Mapping[str, Any]) -> dict[str, float]:
    """What lm-eval says of a task, numbers alone."""
    numbers = {name: value for name, value in entries.items() if "," in name and isinstance(value, int | float)}
    return {name.removesuffix(NO_FILTER): float(value) for name, value in numbers.items()}


@contextlib.contextmanager
def _beside_stdout() -> Iterator[None]:
    """Sends to stderr what lm-eval prints, since stdout may carry a JSON answer; and keeps it from forking a process
    with jax's threads in it, which may never answer."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
