"""Cases of a measurement, each in a process of its own: all are compiled at once, then they run one after another.

Compiling takes most of a benchmark's time and needs no device for itself; timing needs all of them. A case has its turn
once every case is compiled, or has ended, and the processes of those before it are gone, with their memory.

The caller runs `in_turn` with a command that understands `--one CASE FOLDER`. There, the process makes its `Turn`,
compiles, calls `wait`, measures, and hands back its results by `answer`.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.files import write_atomically

PATIENCE = 600.0  # seconds that a case waits for its turn
POLL = 0.1  # seconds
ORDER, READY, ENDED, RESULTS, LOGS = "order.json", "ready", "ended", "results", "logs"

Results = list[dict[str, Any]]


class Turn(NamedTuple):
    """The place of one case in the order, as its process sees it."""

    name: str
    folder: Path

    def wait(self) -> None:
        """Says that this case is compiled, and returns when it has the devices for itself. Raises TimeoutError."""
        order = json.loads((self.folder / ORDER).read_text())
        (self.folder / READY / self.name).touch()
        earlier, began = set(order[: order.index(self.name)]), time.monotonic()
        while True:
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
    order: Sequence[str], command: Sequence[str], *, limit_s: float | None = None, ready_s: float | None = None
) -> Outcome:
    """Runs `command --one CASE FOLDER` for each case of `order`. A case that fails does not hold up the others.

    limit_s: cases that still run after so many seconds are ended, so that the results of the others are not lost.
    ready_s: so are those that do not wait for their turn by then, so that the others need not wait for them.
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
        failures = _run({name: [*command, "--one", name, made] for name in order}, folder, limit_s, ready_s)
        found = {name: folder / RESULTS / name for name in order}
        results = [row for file in found.values() if file.is_file() for row in json.loads(file.read_text())]
        silent = {name: _last_line(folder, name) for name, file in found.items() if not file.is_file()}
        return Outcome(results, {**silent, **failures})


def _run(
    commands: Mapping[str, Sequence[str]], folder: Path, limit_s: float | None, ready_s: float | None
) -> dict[str, str]:
    """Starts the processes and marks those that end. Returns by case why it failed."""
    began, running, failures = time.monotonic(), {}, {}
    try:
        for name, command in commands.items():
            with (folder / LOGS / name).open("w") as log:
                running[name] = subprocess.Popen(command, stdout=log, stderr=log)
        while running:
            passed, ready = time.monotonic() - began, _names(folder / READY)
            for name, process in list(running.items()):
                limit = limit_s if ready_s is None or name in ready else min(ready_s, limit_s or ready_s)
                if limit is not None and passed > limit:
                    process.kill()
                    process.wait()
                    failures[name] = f"ended after the limit of {limit:g} s"
                elif process.poll() is None:
                    continue
                elif process.returncode:
                    failures[name] = f"exit status {process.returncode}: {_last_line(folder, name)}"
                del running[name]
                (folder / ENDED / name).touch()
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return failures


def _last_line(folder: Path, name: str) -> str:
    lines = (folder / LOGS / name).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing was printed"


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
