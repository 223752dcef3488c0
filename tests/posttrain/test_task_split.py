"""Held-out tasks ask nothing that is trained on."""

import pytest

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import asked
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.task_split import split_tasks

DATA = DataConfig(corpus="environments", tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.2)


class Repeating:
    """40 questions; each is a task four times, of which the last needs another answer."""

    def __len__(self):
        return 160

    def example(self, number):
        return asked(str(number), f"question {number % 40}", number // 120)


def questions(environment, numbers):
    return {environment.example(number).messages[0]["content"] for number in numbers}


def test_no_held_out_question_is_trained_on():
    found = split_tasks({"a": Repeating()}, DATA)
    parts = [found.numbers[part]["a"] for part in ("train", "heldout", "tuning")]
    asked_in = [questions(Repeating(), numbers) for numbers in parts]
    assert sum(map(len, asked_in)) == len(set.union(*asked_in)) == 40 and all(asked_in)
    assert sorted(sum(parts, [])) == [*range(40), *range(120, 160)] and not found.repeated
    assert [len(found.texts[part]) for part in ("train", "heldout", "tuning")] == list(map(len, parts))


def test_too_few_questions_are_repeated_and_named():
    """`copy` of level 1 has eight questions, addition of level 2 thousands."""
    few, many = (
        make_environment(EnvironmentConfig(name=name, kind="synthetic", family=name, level=level, examples=60))
        for name, level in (("copy", 1), ("addition", 2))
    )
    found = split_tasks({"copy": few, "addition": many}, DATA)
    assert found.repeated == ["copy"]
    heldout, train = found.numbers["heldout"], found.numbers["train"]
    assert questions(few, heldout["copy"]) <= questions(few, train["copy"]) and heldout["copy"]
    assert not questions(many, heldout["addition"]) & questions(many, train["addition"]) and heldout["addition"]


def test_an_environment_needs_a_task_to_train_on():
    one = make_environment(EnvironmentConfig(name="one", kind="synthetic", family="copy", examples=1))
    with pytest.raises(ConfigError, match="environment '.' has no task to train on"):
        for name in "abcdefghij":
            split_tasks({name: one, "many": Repeating()}, DATA)
