"""Runs the processes of a sweep, several at a time, and records their results."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.launch.local import LAST_LINE, end_with_parent
from orogen.sweep.plan import Run
from orogen.sweep.results import Results, read_run
from orogen.train.lock import STALE_SECONDS, check_free

LOOK_SECONDS = 0.2
OROGEN = (sys.executable, "-m", "orogen.cli")
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
USABLE = 0.92  # of a GPU's memory, for all runs that share it


class Failure(NamedTuple):
    """A run that did not end well: its name, and why in one line."""

    name: str
    reason: str


class Runner:
    """Starts `orogen train` for runs that have no result yet, at most `at_once` at a time.

    folder: of the sweep; run NAME trains in runs/NAME from configs/NAME.gin and writes to logs/NAME.log. numbers: those
    of a result, the metric first. extra: options that every run gets. launcher: arguments of `orogen launch` that each
    run goes through; those of a queue come back at once, and then `submitted/NAME` keeps the run from being submitted
    twice. program: what takes these arguments.
    """

    def __init__(
        self, folder: Path, results: Results, *, numbers: Sequence[str], at_once: int,
        environments: Sequence[Mapping[str, str]], extra: Sequence[str] = (), launcher: str = "",
        log: Callable[[str], None], program: Sequence[str] = OROGEN,
    ):  # fmt: skip
        self._folder, self._results, self._numbers, self._log = folder, results, numbers, log
        self._free = [dict(environments[k % len(environments)]) for k in range(at_once)]
        self._extra, self._launcher, self._program = extra, shlex.split(launcher), program
        self._live: dict[subprocess.Popen[bytes], tuple[Run, dict[str, str]]] = {}
        self.failures: list[Failure] = []
        self.submitted: list[str] = []

    def run(self, runs: Sequence[Run]) -> None:
        """Runs those that have no result yet, in order. On an exception (Ctrl-C, SIGTERM) the living ones are told to
        save and end, and are waited for."""
        waiting = [run for run in runs if not self._done(run)]
        ended, begun = len(runs) - len(waiting), time.monotonic()
        if ended:
            self._log(f"{ended} of {len(runs)} runs are done already")
        try:
            while waiting or self._live:
                while waiting and self._free:
                    self._start(waiting.pop(0))
                for run in self._ended():
                    ended += 1
                    done = self._results.of(run)
                    what = "failed" if done is None else _told(self._numbers[0], done["value"])
                    self._log(f"{ended}/{len(runs)} {run.name}: {what}, after {time.monotonic() - begun:.0f} s")
                time.sleep(LOOK_SECONDS)
        finally:
            for process in self._live:
                process.send_signal(signal.SIGTERM)
            for process in self._live:
                process.wait()

    def _done(self, run: Run) -> bool:
        """Whether the run has a result, or gets one now because it ended unwatched, or has been submitted to a
        queue."""
        if self._results.of(run) is not None:
            return True
        if (facts := read_run(self._folder / "runs" / run.name, run, self._numbers)) is not None:
            self._results.add(run, facts)
            return True
        if self._launcher and self._mark(run).exists():
            self.submitted.append(run.name)
            return True
        return False

    def _start(self, run: Run) -> None:
        target = self._folder / "runs" / run.name
        for folder in ("runs", "configs", "logs", "submitted"):
            (self._folder / folder).mkdir(parents=True, exist_ok=True)
        _wait_until_free(target)
        config = self._folder / "configs" / f"{run.name}.gin"
        write_atomically(config, run.text.encode())
        train = ["train", "--gin_file", str(config), "--run", str(target), "--resume", *self._extra]
        train += ["--checkpoint", run.checkpoint] if run.checkpoint else []
        task = ["launch", *self._launcher, "--", *train] if self._launcher else train
        environment = self._free.pop()
        with (self._folder / "logs" / f"{run.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._program, *task], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **environment}, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        self._live[process] = run, environment

    def _ended(self) -> Iterator[Run]:
        for process in [p for p in self._live if p.poll() is not None]:
            run, environment = self._live.pop(process)
            self._free.append(environment)
            facts = read_run(self._folder / "runs" / run.name, run, self._numbers)
            if facts is not None:
                self._results.add(run, facts)
            elif process.returncode == 0 and self._launcher:
                write_atomically(self._mark(run), b"")
                self.submitted.append(run.name)
            else:
                log = self._folder / "logs" / f"{run.name}.log"
                self.failures.append(Failure(run.name, f"status {process.returncode}: {_last_line(log)}"))
            yield run

    def _mark(self, run: Run) -> Path:
        return self._folder / "submitted" / run.name


def _told(metric: str, value: float | None) -> str:
    return "diverged" if value is None else f"{metric} {value:.4f}"


def environments(count: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """For each of `count` runs at a time, the variables that give it one of the GPUs, by their numbers, or a part of
    one; nothing without GPUs."""
    if not gpus:
        return [{}]
    per_gpu = -(-count // len(gpus))
    part = {MEMORY_FRACTION: f"{USABLE / per_gpu:.3f}"} if per_gpu > 1 else {}
    return [{"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)], **part} for k in range(count)]


def _wait_until_free(folder: Path) -> None:
    """Waits for a process that is still saving there, because it was told to end with the sweep that started it."""
    until = time.monotonic() + STALE_SECONDS
    while True:
        try:
            return check_free(folder)
        except ConfigError:
            if time.monotonic() > until:
                raise
        time.sleep(LOOK_SECONDS)


def _last_line(file: Path) -> str:
    lines: list[Any] = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:LAST_LINE] if lines else "it wrote nothing"
