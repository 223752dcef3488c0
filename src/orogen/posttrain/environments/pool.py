"""Processes that verify answers: one that crashes, hangs or floods is ended, counted, and replaced."""

import collections
import os
import queue
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from orogen.config.json_file import parse_json
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Said, Turn
from orogen.posttrain.environments.worker import LENGTH, config_message, written

WORKER = "orogen.posttrain.environments.worker"
MOST_ANSWER = 2**22  # bytes of one answer
START_SECONDS = 60.0  # for Python and what an environment imports
# What can become of a verification, beside a turn.
TIMEOUT, CRASH, FLOOD, RAISED, NAN = FAULTS = ("timeout", "crash", "flood", "raised", "nan")


class Fault(NamedTuple):
    """A verification that came to nothing, and why: one of FAULTS, and a line."""

    kind: str
    reason: str


class Asked(NamedTuple):
    """A turn to verify: the task's number, the state of its episode, and what the model said."""

    number: int
    state: Any
    said: Said


class Pool:
    """Verifies the turns of one environment in `workers` processes, each started when first needed."""

    def __init__(self, config: EnvironmentConfig, *, workers: int, module: str = WORKER) -> None:
        """module: what a process runs, with the protocol of `worker`."""
        self.config, self.faults = config, collections.Counter[str]()
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(config, module) for _ in range(workers)]
        for worker in self._all:
            self._workers.put(worker)
        self._threads = ThreadPoolExecutor(workers, "verify")

    def verify(self, turns: Sequence[Asked]) -> list[Turn | Fault]:
        """What comes of each turn, in their order. Faults are counted in `faults`."""
        found = list(self._threads.map(self._one, turns))
        self.faults.update(one.kind for one in found if isinstance(one, Fault))
        return found

    def _one(self, asked: Asked) -> Turn | Fault:
        worker = self._workers.get()
        try:
            return worker.ask(asked)
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown()
        for worker in self._all:
            worker.end()


class _Worker:
    """One process, one turn at a time."""

    def __init__(self, config: EnvironmentConfig, module: str) -> None:
        self._config, self._module = config, module
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, asked: Asked) -> Turn | Fault:
        request = {"number": asked.number, "state": asked.state, "said": asked.said._asdict()}
        # A task of many tests has a deadline of its own for each: the sandbox ends those.
        seconds = self._config.seconds * (60 if self._config.kind == "code" else 1)
        try:
            answer = self._exchange(written(request), seconds)
        except TimeoutError:
            self.end()
            return Fault(TIMEOUT, f"no answer within {self._config.seconds} s")
        except _FloodError as error:
            self.end()
            return Fault(FLOOD, str(error))
        except (OSError, EOFError, ValueError) as error:
            self.end()
            return Fault(CRASH, f"the verifier ended: {error}")
        if "error" in answer:
            return Fault(NAN if answer.get("nan") else RAISED, answer["error"])
        return Turn(answer["state"], answer["replies"], answer["rewards"])

    def _exchange(self, data: bytes, seconds: float) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(data)
        process.stdin.flush()
        return self._answer(process, seconds)

    def _answer(self, process: "subprocess.Popen[bytes]", seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        (length,) = LENGTH.unpack(_read(process.stdout.fileno(), LENGTH.size, deadline))
        if length > MOST_ANSWER:
            raise _FloodError(f"an answer of {length} bytes; expected at most {MOST_ANSWER}")
        return parse_json(_read(process.stdout.fileno(), length, deadline), where="the verifier")

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            assert self._process.stdin is not None
            self._process.stdin.write(written(config_message(self._config)))
            self._process.stdin.flush()
            self._answer(self._process, START_SECONDS)  # it is ready
        return self._process

    def end(self) -> None:
        """Ends the process, and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.poll()  # it has ended
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    process.poll()  # what was not sent yet has no reader


class _FloodError(Exception):
    """An answer that is too long."""


def _read(descriptor: int, count: int, deadline: float) -> bytes:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    parts: list[bytes] = []
    while count:
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(descriptor, min(count, 2**16))
        if not part:
            raise EOFError("its output ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
