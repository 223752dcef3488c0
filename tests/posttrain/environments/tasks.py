"""Environments of one task, and what they give for an answer."""

import json
from pathlib import Path
from typing import Any

from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Said
from orogen.posttrain.environments.make import make_environment


def made(kind: str, **fields: Any) -> Any:
    """An environment of this kind."""
    return make_environment(EnvironmentConfig(name="a", kind=kind, **fields))


def reward(environment: Any, answer: str, number: int = 0) -> float:
    """The sum of the rewards of an answer to an example."""
    example = environment.example(number)
    turn = environment.step(example, environment.start(example), Said(answer, answer))
    return sum(turn.rewards.values())


def lines(folder: Path, *tasks: Any) -> str:
    """A file of tasks."""
    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return str(file)
