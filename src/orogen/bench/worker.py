"""A program in its own process, with requests and answers as lines of JSON; and a timer for its runs."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from orogen.config.checks import ConfigError


class Worker:
    """A process that runs `python -m MODULE`, reads `settings` first and then answers requests.

    facts: the answer to `settings`. Use it as a context manager, or call `close`, which waits for the process to end.
    Raises ConfigError if the process raises one, RuntimeError if the process ends before it answers.
    """

    def __init__(self, module: str, settings: Any, environment: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._questions, self._answers = self._process.stdin, self._process.stdout
        try:
            self.facts: dict[str, Any] = self.ask(settings)
        except BaseException:
            self._process.kill()
            raise

    def ask(self, question: Any) -> Any:
        """The process's answer."""
        try:
            print(json.dumps(question), file=self._questions, flush=True)
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(
                f"the process of {self._process.args[-1]} ended with status {self._process.wait()}; "  # pyright: ignore
                "its own output is above"
            )
        reply = json.loads(answer)
        if "refused" in reply:
            raise ConfigError(reply["refused"])
        return reply["answer"]

    def close(self) -> None:
        """Closes the pipes, which ends the process, and waits for its end."""
        self._questions.close()
        self._answers.close()
        self._process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(prepare: Callable[[Any], tuple[dict[str, Any], Callable[[Any], Any]]]) -> None:
    """The process's side: `prepare` takes the settings and returns the facts and a function that answers each question.

    Each reply is a line {"answer": …}; a ConfigError is sent as {"refused": MESSAGE} and ends the process.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing but answers may reach the pipe

    def tell(**reply: Any) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    try:
        facts, answer = prepare(json.loads(sys.stdin.readline()))
        tell(answer=facts)
        for line in sys.stdin:
            tell(answer=answer(json.loads(line)))
    except ConfigError as error:
        tell(refused=str(error))


def seconds_a_run(start: Callable[[], Any], wait: Callable[[Any], Any], runs: int) -> list[float]:
    """Seconds from the end of each run to the end of the next, for `runs` runs in a row.

    `start` begins a run; `wait` returns once its result is ready. Each run is started while the previous one is still
    running, as in a training loop, so that the host's preparation overlaps with the device's work.
    """
    finished, running = [], start()
    for _ in range(runs + 1):
        ahead = start()
        wait(running)
        finished.append(time.perf_counter())
        running = ahead
    wait(running)
    return [end - before for before, end in itertools.pairwise(finished)]
