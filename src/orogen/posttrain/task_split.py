"""Which tasks of environments are trained on and which are held out."""

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data import corpora
from orogen.data.readers import Document
from orogen.posttrain.environments.interface import Environment

LEAST_QUESTIONS = 20  # different ones, below which an environment has too few to hold some out


class SplitTasks(NamedTuple):
    """documents: all tasks as text; texts and numbers: by split, and numbers also by environment; repeated:
    environments whose held-out tasks ask what is trained on too."""

    documents: list[Document]
    texts: dict[str, list[Document]]
    numbers: dict[str, dict[str, list[int]]]
    repeated: list[str]


class _Task(NamedTuple):
    number: int
    document: Document
    place: str  # what decides the split


def split_tasks(environments: Mapping[str, Environment], data: DataConfig) -> SplitTasks:
    """Splits by the hash of the question, so that no held-out question is trained on; of tasks that are alike in all,
    only the first counts. An environment with fewer than LEAST_QUESTIONS questions is split by the numbers of its
    tasks, and is named in `repeated`.

    Raises ConfigError if a split with a fraction above 0, or an environment's training split, has no task.
    """
    found = SplitTasks(
        [], {part: [] for part in corpora.SPLITS},
        {part: {name: [] for name in environments} for part in corpora.SPLITS}, [],
    )  # fmt: skip
    for name, environment in environments.items():
        tasks, repeated = _tasks(name, environment)
        if repeated and data.heldout_fraction:
            found.repeated.append(name)
        for task in tasks:
            part = corpora.split_of(task.place, config=data)
            found.documents.append(task.document)
            found.texts[part].append(task.document)
            found.numbers[part][name].append(task.number)
    sizes = {part: len(texts) for part, texts in found.texts.items()}
    corpora.check_splits(sizes, len(found.documents), config=data)
    for name, numbers in found.numbers["train"].items():
        if not numbers:
            raise ConfigError(f"environment {name!r} has no task to train on; expected more examples")
    return found


def _tasks(name: str, environment: Environment) -> tuple[list[_Task], bool]:
    """The tasks that count, and whether their questions are too few."""
    questions, texts = [], []
    for number in range(len(environment)):
        example = environment.example(number)
        asked = [list(example.messages), list(example.tools)]
        questions.append(hashlib.sha256(json.dumps(asked).encode()).hexdigest())
        texts.append(json.dumps([*asked, example.secret], ensure_ascii=False))
    keys = [f"{name}/{number}" for number in range(len(texts))]
    if len(set(questions)) < LEAST_QUESTIONS:
        return [_Task(number, Document(key, texts[number]), key) for number, key in enumerate(keys)], True
    first = {text: number for number, text in reversed(list(enumerate(texts)))}
    numbers = sorted(first.values())
    return [_Task(n, Document(keys[n], texts[n]), f"{name}/{questions[n]}") for n in numbers], False
