"""Processes that verify answers: one that crashes, hangs or floods is ended, counted, and replaced."""

import collections
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.json_file import parse_json
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import CRASH, FLOOD, RAISED, TIMEOUT, Said, Turn
from orogen.posttrain.environments.worker import LENGTH, config_message, written

WORKER = "orogen.posttrain.environments.worker"
MOST_ANSWER = 2**22  # bytes of one answer
MOST_ERRORS = 2**16  # bytes of what a process says while it starts
START_SECONDS = 60.0  # for Python and what an environment imports
GIVE_UP = 32  # verifications in a row without an answer, after which the environment counts as broken


class Fault(NamedTuple):
    """A verification that came to nothing, and why: one of `interface.FAULTS`, and a line."""

    kind: str
    reason: str


class Asked(NamedTuple):
    """A turn to verify: the task's number, the state of its episode, and what the model said."""

    number: int
    state: Any
    said: Said


class Pool:
    """Verifies the turns of one environment in `workers` processes: the first one is started at once, so that an
    environment that cannot run is refused, and the others when they are first needed. Raises ConfigError."""

    def __init__(self, config: EnvironmentConfig, *, workers: int, gives_up: bool = True, module: str = WORKER) -> None:
        """gives_up: whether a broken environment is an error, which ends a run; else every turn is tried. module: what
        a process runs, with the protocol of `worker`."""
        self.config, self.faults, self._gives_up = config, collections.Counter[str](), gives_up
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(config, module) for _ in range(workers)]
        for worker in self._all:
            self._workers.put(worker)
        self._silent, self._counts = 0, threading.Lock()
        self._all[0].begin()
        self._threads = ThreadPoolExecutor(workers, "verify")

    def verify(self, turns: Sequence[Asked], progress: Callable[[], None] = lambda: None) -> list[Turn | Fault]:
        """What comes of each turn, in their order. Faults are counted in `faults`. progress: called after each.

        Raises ConfigError when GIVE_UP verifications in a row ended without an answer, if the pool gives up.
        """
        found: list[Turn | Fault] = []
        for one in self._threads.map(self._one, turns):
            found.append(one)
            with self._counts:  # a server verifies in several threads
                self.faults.update([one.kind] if isinstance(one, Fault) else ())
            progress()
        return found

    @property
    def broken(self) -> bool:
        """Whether the last GIVE_UP verifications had no answer."""
        with self._counts:
            return self._silent >= GIVE_UP

    def _one(self, asked: Asked) -> Turn | Fault:
        worker = self._workers.get()
        try:
            if self._gives_up and self.broken:
                raise ConfigError(
                    f"environment {self.config.name!r}: {GIVE_UP} verifications in a row had no answer; expected a "
                    f"verifier that answers within EnvironmentConfig.seconds = {self.config.seconds:g}"
                )
            found = worker.ask(asked)
            with self._counts:
                self._silent = self._silent + 1 if isinstance(found, Fault) and found.kind in (TIMEOUT, CRASH) else 0
            return found
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        """Ends the processes, also those that are at work."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.end()
        self._threads.shutdown()
        for worker in self._all:
            worker.end()  # one that was just being started


class _Worker:
    """One process, one turn at a time."""

    def __init__(self, config: EnvironmentConfig, module: str) -> None:
        self._config, self._module = config, module
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts the process. Raises ConfigError, with what it said, if it does not get ready."""
        with tempfile.TemporaryFile() as errors:
            try:
                self._started(errors)
            except (OSError, EOFError, ValueError, _FloodError) as error:
                self.end()
                errors.seek(0)
                said = errors.read(MOST_ERRORS).decode(errors="replace").strip().splitlines()
                reason = said[-1] if said else f"{type(error).__name__} {error}"
                raise ConfigError(f"environment {self._config.name!r} does not run: {reason}") from None

    def ask(self, asked: Asked) -> Turn | Fault:
        request = {"number": asked.number, "state": asked.state, "said": asked.said._asdict()}
        # A task of many tests has a deadline of its own for each: the sandbox ends those.
        seconds = self._config.seconds * (60 if self._config.kind == "code" else 1)
        try:
            answer = self._exchange(written(request), seconds)
        except RecursionError:
            return Fault(RAISED, "arguments of a call are nested too deeply to be sent")
        except TimeoutError:
            self.end()
            return Fault(TIMEOUT, f"no answer within {seconds:g} s")
        except _FloodError as error:
            self.end()
            return Fault(FLOOD, str(error))
        except (OSError, EOFError, ValueError) as error:
            self.end()
            return Fault(CRASH, f"the verifier ended: {error}")
        if "error" in answer:
            return Fault(answer.get("kind", RAISED), answer["error"])
        return Turn(answer["state"], answer["replies"], answer["rewards"], answer["left_out"])

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

    def _started(self, errors: IO[bytes] | int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
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
