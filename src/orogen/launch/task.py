"""The command line of a task that is to run on many processes."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from orogen.config.checks import ConfigError

TASKS = ("train", "sft")  # those that can be one of several processes
RESUME, RUN, FAKE = "--resume", "--run", "--fake_devices"


def read_task(words: Sequence[str]) -> list[str]:
    """The task and its arguments, without the `--` in front. Raises ConfigError."""
    task = list(words[1:] if words[:1] == ["--"] else words)
    if not task or task[0] not in TASKS:
        raise ConfigError(
            f"the task is {task[0] if task else ''!r}; expected {' or '.join(TASKS)} and its options after --"
        )
    return task


def command(task: Sequence[str], *, resume: bool = False) -> list[str]:
    """The command line of one process, by this Python. resume: whether it continues what another began."""
    return [sys.executable, "-m", "orogen.cli", *(resuming(task) if resume else task)]


def resuming(task: Sequence[str]) -> list[str]:
    """The task, continued: what a process runs after another did not end well."""
    return [*task] if RESUME in task else [*task, RESUME]


def option(task: Sequence[str], name: str) -> str | None:
    """The value of an option of the task; None if it is not there."""
    for word, following in zip(task, [*task[1:], None], strict=True):
        if word == name and following is not None:
            return following
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def log_folder(task: Sequence[str]) -> Path:
    """Where output goes by default: beside the run folder, which must begin empty."""
    run = option(task, RUN)
    return Path("launch.logs") if run is None else Path(run).with_name(f"{Path(run).name}.logs")


def job_name(task: Sequence[str]) -> str:
    """A name for a queue, in the letters that all of them allow (RFC 1123): the task's and the run folder's."""
    words = f"orogen-{task[0]}-{Path(option(task, RUN) or '').name}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words)[:40].strip("-")
