"""Where the passes run: processes of this host, SLURM's jobs or Ray's tasks, by datatrove's executors.

The number of tasks of a pass follows from the inputs, never from the number of workers.
"""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from orogen.config.streams import say
from orogen.data.curate.work import Work

REPORT_SECONDS = 10.0


class Pass(NamedTuple):
    """Steps that run once per task, after all tasks of the pass before."""

    name: str
    steps: list[Any]
    tasks: int


class Resources(NamedTuple):
    """Where and on how many workers. partition, time, memory_gb: for SLURM; memory_gb for Ray too."""

    executor: str = "local"
    workers: int = 1
    partition: str | None = None
    time: str = "24:00:00"
    memory_gb: int = 4
    setup: str | None = None


def execute(passes: Sequence[Pass], work: Work, resources: Resources) -> str | None:
    """Runs the passes in order, without the tasks that are complete. With SLURM they are submitted only, and the last
    job's id is returned. Raises what a task raises."""
    if resources.executor == "slurm":
        return _submit(passes, work, resources)
    for one in passes:
        if _left(one, work):
            with _Progress(one, work):
                _executor(one, work, resources).run()
    return None


def _left(one: Pass, work: Work) -> int:
    """How many tasks are not complete."""
    folder = work.logs(one.name) / "completions"
    return one.tasks - (len(list(folder.iterdir())) if folder.is_dir() else 0)


def _executor(one: Pass, work: Work, resources: Resources) -> Any:
    if resources.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(
            one.steps, tasks=one.tasks, workers=resources.workers, logging_dir=str(work.logs(one.name)),
            mem_per_cpu_gb=resources.memory_gb,
        )  # fmt: skip
    import multiprocess
    from datatrove.executor.local import LocalPipelineExecutor

    # Workers are forked from a process that has imported what they need, instead of importing it once each per pass.
    forkserver = multiprocess.get_context("forkserver")  # pyright: ignore[reportAttributeAccessIssue]
    forkserver.set_forkserver_preload(["orogen.data.curate.run"])
    workers = min(resources.workers, one.tasks)
    return LocalPipelineExecutor(one.steps, tasks=one.tasks, workers=workers, logging_dir=str(work.logs(one.name)))


def _submit(passes: Sequence[Pass], work: Work, resources: Resources) -> str:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    assert resources.partition is not None  # the command line asks for it
    last = None
    for one in passes:
        folder = work.logs(one.name)
        last = SlurmPipelineExecutor(
            one.steps, tasks=one.tasks, workers=resources.workers, time=resources.time, partition=resources.partition,
            mem_per_cpu_gb=resources.memory_gb, job_name=f"curate-{one.name}", logging_dir=str(folder),
            slurm_logs_folder=str(folder / "slurm"), env_command=resources.setup or "", depends=last,
            mail_type="NONE", qos="",
        )  # fmt: skip
    assert last is not None
    last.run()
    return str(last.job_id)


class _Progress:
    """Says on stderr that a pass runs and, every REPORT_SECONDS, how many of its tasks are complete."""

    def __init__(self, one: Pass, work: Work, log: Callable[[str], None] = say):
        self._one, self._work, self._log = one, work, log
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="curate progress")

    def __enter__(self) -> None:
        self._say()
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(REPORT_SECONDS):
            self._say()

    def _say(self) -> None:
        done = self._one.tasks - _left(self._one, self._work)
        self._log(f"{self._one.name}: {done} of {self._one.tasks} tasks")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
