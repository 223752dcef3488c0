"""Cases of a measurement, each in a process of its own: all are compiled at once, then they run one after another.

Compiling takes most of a benchmark's time and needs no device for itself; timing needs all of them. A case has its turn
once every case is compiled, or has ended, and the processes of those before it are gone, with their memory.

The caller runs `in_turn` with a command that understands `--one CASE FOLDER`. There, the process makes its `Turn`,
compiles, calls `wait`, measures, and hands back its results by `answer`.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.files import write_atomically

PATIENCE = 600.0  # seconds that a case waits for its turn
POLL = 0.1  # seconds
ORDER, READY, ENDED, RESULTS, LOGS = "order.json", "ready", "ended", "results", "logs"
CALLER = "caller"  # the file with the process of `in_turn`
TRACEBACK = "Traceback (most recent call last):"
RAISED = 1  # the exit status of a process that an exception has ended

Results = list[dict[str, Any]]


class Turn(NamedTuple):
    """The place of one case in the order, as its process sees it."""

    name: str
    folder: Path

    def wait(self) -> None:
        """Says that this case is compiled, and returns when it has the devices for itself. Raises TimeoutError, and
        ChildProcessError if the caller of `in_turn` ends while it waits."""
        order = json.loads((self.folder / ORDER).read_text())
        caller = int((self.folder / CALLER).read_text())
        (self.folder / READY / self.name).touch()
        earlier, began = set(order[: order.index(self.name)]), time.monotonic()
        while True:
            if os.getppid() != caller:  # a number may still be that of a process that has ended
                raise ChildProcessError(f"{self.name} has nobody to answer: process {caller} is gone")
            ended = _names(self.folder / ENDED)
            if earlier <= ended and set(order) <= ended | _names(self.folder / READY):
                return
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError(f"{self.name} waited {PATIENCE:g} s for the other cases")
            time.sleep(POLL)

    def answer(self, results: Results) -> None:
        """Hands the case's results to `in_turn`."""
        write_atomically(self.folder / RESULTS / self.name, json.dumps(results).encode())


class Outcome(NamedTuple):
    """Results of the cases in their order, and by case why it failed."""

    results: Results
    failures: dict[str, str]


def in_turn(
    order: Sequence[str],
    command: Sequence[str],
    *,
    limit_s: float | None = None,
    ready_s: float | None = None,
    ended: Callable[[Outcome], None] = lambda outcome: None,
    logs: Path | None = None,
) -> Outcome:
    """Runs `command --one CASE FOLDER` for each case of `order`. A case that fails does not hold up the others.

    limit_s: cases that still run after so many seconds are ended, so that the results of the others are not lost.
    ready_s: so are those that do not wait for their turn by then, so that the others need not wait for them.
    ended: called whenever a case has ended, with all that have; a caller that may be killed can keep their results.
    logs: a folder for what the cases that failed have printed, `CASE.log`; that of a case which did not is removed.
    Raises ValueError if a name cannot be that of a file.
    """
    unfit = [name for name in order if "/" in name or not name.strip(".")]
    if unfit or len(set(order)) < len(order):
        raise ValueError(f"cases {list(order)!r}; expected different names without a slash")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for part in (READY, ENDED, RESULTS, LOGS):
            (folder / part).mkdir()
        (folder / ORDER).write_text(json.dumps(list(order)))
        (folder / CALLER).write_text(str(os.getpid()))
        commands, failures = {name: [*command, "--one", name, made] for name in order}, {}
        for name, why in _run(commands, folder, limit_s, ready_s):
            answered = (folder / RESULTS / name).is_file()
            if why is not None or not answered:
                failures[name] = why or _why(folder, name, 0)
            if logs is not None:
                _keep_log(folder, name, logs, failed=name in failures)
            ended(Outcome(_results(folder, order), dict(failures)))
        return Outcome(_results(folder, order), failures)


def _results(folder: Path, order: Sequence[str]) -> Results:
    """What the cases that answered have handed back, in order."""
    files = [folder / RESULTS / name for name in order]
    return [row for file in files if file.is_file() for row in json.loads(file.read_text())]


def _run(
    commands: Mapping[str, Sequence[str]], folder: Path, limit_s: float | None, ready_s: float | None
) -> Iterator[tuple[str, str | None]]:
    """Starts the processes and marks those that end. Yields each that has ended with why it failed, None if it did
    not."""
    began, running = time.monotonic(), {}
    try:
        for name, command in commands.items():
            with (folder / LOGS / name).open("w") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=log)
        while running:
            passed, ready = time.monotonic() - began, _names(folder / READY)
            for name, process in list(running.items()):
                limit, why = limit_s if ready_s is None or name in ready else min(ready_s, limit_s or ready_s), None
                if limit is not None and passed > limit:
                    process.kill()
                    process.wait()
                    why = f"ended after the limit of {limit:g} s"
                elif process.poll() is None:
                    continue
                elif process.returncode:
                    why = f"exit status {process.returncode}: {_why(folder, name, process.returncode)}"
                del running[name]
                (folder / ENDED / name).touch()
                yield name, why
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _keep_log(folder: Path, name: str, logs: Path, *, failed: bool) -> None:
    kept = logs / f"{name}.log"
    if not failed:
        kept.unlink(missing_ok=True)
        return
    logs.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, (folder / LOGS / name).read_bytes())


def _why(folder: Path, name: str, status: int) -> str:
    """The exception that has ended a case, or else the last line that it printed."""
    lines = (folder / LOGS / name).read_text(errors="replace").strip().splitlines()
    if status == RAISED and TRACEBACK in lines:
        # Frames are indented. Notes may follow the exception, as jax adds one, and what was still buffered.
        last = len(lines) - lines[::-1].index(TRACEBACK)
        return next((line for line in lines[last:] if line and not line[0].isspace()), lines[-1])
    return (lines or ["nothing was printed"])[-1]


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
