"""Programs that must pass unit tests, in the sandbox.

A task is a line {"key"?: text, "prompt": text, "tests": [{"input": text, "output": text}, …]} whose program reads stdin
and writes stdout, or {…, "check": Python source} that calls functions of the program, as in HumanEval: it runs in
another process (`checked.py`), with plain values as arguments and results, and the program cannot read it: in
bubblewrap it finds no other process that knows it. Without bubblewrap the process of the check is as closed, but a
program can read whatever else this user can, such as the file of the tasks. A check that needs the program's classes,
generators or changed arguments fails. Without a file, tasks ask for small functions.
"""

import json
import random
from pathlib import Path
from typing import Any

from orogen.config.json_file import ListOf, Record
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.files import lines_of
from orogen.posttrain.environments.interface import Example, Said, Turn, asked, over
from orogen.posttrain.environments.sandbox import Sandbox

MOST_TESTS = 50  # of one task, as in Nemotron 3 Nano's RLVR
FENCE = "```"
_CHECKED = Path(__file__).with_name("checked.py").read_text(encoding="utf-8")
_TASK = Record({"prompt": str}, {"key": str, "tests": ListOf(Record({"input": str, "output": str})), "check": str})


class Code:
    """Raises ConfigError without bubblewrap, unless `EnvironmentConfig.unsandboxed`; and for a malformed file."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._sandbox = Sandbox(
            seconds=config.seconds, memory=config.memory_mb * 2**20, unsandboxed=config.unsandboxed
        )  # fmt: skip
        self._config = config
        self._tasks = None
        if config.corpus is not None:
            self._tasks = lines_of(Path(config.corpus), _TASK, one_of=("tests", "check"))
        if self._tasks is None or any("check" in task for task in self._tasks):
            # What fails here would make every program wrong.
            self._sandbox.require("a check of a right program", _CHECKED, _given("x = 1", "assert x == 1"))

    def __len__(self) -> int:
        return self._config.examples if self._tasks is None else len(self._tasks)

    def example(self, number: int) -> Example:
        """Task `number`."""
        if self._tasks is None:
            return _generated(number, self._config)
        task = self._tasks[number]
        return asked(task.get("key") or str(number), task["prompt"], task)

    def start(self, example: Example) -> Any:
        """Nothing."""
        return None

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """1 if every test passes, else 0."""
        program, task = program_of(said.content or said.text), example.secret
        if "check" in task:
            return over(tests=float(self._passes(program, task["check"])))
        for test in task["tests"][:MOST_TESTS]:
            ran = self._sandbox.run(program, test["input"].encode())
            if ran.end != "finished" or _words(ran.output) != _words(test["output"].encode()):
                return over(tests=0.0)
        return over(tests=1.0)

    def _passes(self, program: str, check: str) -> bool:
        """Whether the check, which calls the program, runs to its end."""
        return self._sandbox.run(_CHECKED, _given(program, check), trusted=True).end == "finished"


def _given(program: str, check: str) -> bytes:
    """What `checked.py` reads."""
    return json.dumps({"program": program, "check": check}).encode()


def _words(output: bytes) -> list[list[bytes]]:
    """Lines of words: space at line ends and empty lines at the end do not count."""
    return [line.split() for line in output.rstrip().split(b"\n")]


def program_of(text: str) -> str:
    """The last block of code in an answer; all of it if there is none."""
    parts = text.split(FENCE)
    if len(parts) < 3:
        return text
    block = parts[-2] if len(parts) % 2 else parts[-1]
    language, line, rest = block.partition("\n")
    return rest if line and language.strip().lower() in ("", "python", "python3", "py") else block


def _generated(number: int, config: EnvironmentConfig) -> Example:
    rng = random.Random(f"code {config.level} {config.seed} {number}")
    a, b = rng.randrange(2, 10**config.level + 2), rng.randrange(10**config.level)
    name, operator = f"f{number}", rng.choice("*+-")
    value = {"*": lambda x: a * x, "+": lambda x: a + x, "-": lambda x: a - x}[operator]
    checks = "\n".join(f"assert {name}({x}) == {value(x) + b}" for x in (0, 1, 7, -3))
    text = f"Write a Python function {name}(x) that returns {a} {operator} x, plus {b}."
    return asked(str(number), text, {"check": checks})
