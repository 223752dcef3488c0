"""Data sets of `reasoning-gym` (https://github.com/open-thought/reasoning-gym, version 0.1.25, Apache-2.0): more than a
hundred families, each with a scorer of its own. Needs the extra `rl`."""

import importlib
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Example, Said, Turn, asked, over

ASK = "Give the final answer alone between <answer> and </answer>."


class Reasoning:
    """One data set. An answer is what stands between the last <answer> and </answer>, or else the whole content.

    Raises ConfigError without the package, or for a data set that it does not have.
    """

    def __init__(self, config: EnvironmentConfig) -> None:
        try:
            gym = importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise ConfigError(
                f"EnvironmentConfig.kind is 'reasoning_gym'; expected `pip install 'orogen[rl]'` ({error})"
            ) from None
        try:
            self._tasks = gym.create_dataset(config.family, size=config.examples, seed=config.seed)
        except ValueError as error:
            raise ConfigError(f"EnvironmentConfig.family is {config.family!r}; reasoning_gym says: {error}") from None

    def __len__(self) -> int:
        return len(self._tasks)

    def example(self, number: int) -> Example:
        """Task `number` of the data set."""
        return asked(str(number), f"{self._tasks[number]['question']}\n{ASK}", number)

    def start(self, example: Example) -> Any:
        """Nothing."""
        return None

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """The score of the data set's own scorer, from 0 to 1."""
        text = said.content or said.text
        _, found, rest = text.rpartition("<answer>")
        answer = rest.partition("</answer>")[0].strip() if found else text.strip()
        return over(score=float(self._tasks.score_answer(answer, self._tasks[example.secret])))
