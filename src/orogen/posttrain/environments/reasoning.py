"""Data sets of `reasoning-gym` (https://github.com/open-thought/reasoning-gym, version 0.1.25, Apache-2.0): 106
families, each with a scorer of its own and its own default settings. Needs the extra `rl`. `composite`, which needs
settings, cannot be made.

Scorers run in the process that verifies, outside the sandbox. Some evaluate the answer as Python, by `eval` or SymPy's
`parse_expr`: n_queens, binary_matrix, spiral_matrix, string_insertion, countdown, puzzle24, polynomial_multiplication,
simple_integration, intermediate_integration and codeio. A family whose modules call such a function is refused, unless
`EnvironmentConfig.unsandboxed` allows it: text of the model then runs with the rights of this user.
"""

import ast
import importlib
import inspect
import sys
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Example, Said, Turn, asked, over

EVALUATORS = frozenset(("eval", "exec", "parse_expr", "sympify"))
# Families of version 0.1.25 that call one of them on their own questions and answers alone, never on the model's.
HARMLESS = frozenset(("basic_arithmetic", "bitwise_arithmetic", "number_sorting", "propositional_logic"))
ASK = "Give the final answer alone between <answer> and </answer>."


class Reasoning:
    """One data set. An answer is what stands between the last <answer> and </answer>, or else the whole content.

    Raises ConfigError without the package, for a data set that it does not have, and for one whose scorer may run the
    answer, unless `unsandboxed`.
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
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"EnvironmentConfig.family is {config.family!r}; reasoning_gym says: {error}") from None
        called = () if config.family in HARMLESS or config.unsandboxed else _evaluators(type(self._tasks))
        if called:
            raise ConfigError(
                f"EnvironmentConfig.family is {config.family!r}, whose module calls {', '.join(called)}, which may run "
                "the model's answer as Python; expected another family, or EnvironmentConfig.unsandboxed = True"
            )

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


def _evaluators(kind: type) -> list[str]:
    """The functions that run text as Python which the modules of a class and of its bases call."""
    found = set[str]()
    for name in {one.__module__ for one in kind.__mro__ if one.__module__.partition(".")[0] != "builtins"}:
        if name in ("abc", "typing", "collections.abc"):
            continue
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[name]))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
                found.update({str(called)} & EVALUATORS)
    return sorted(found)
