"""A program for two processes with two devices each, and one for a single process with four, which does the same.

`test_training` starts both and compares what they leave; one pair does everything, since each process that is started
imports for seconds. The two programs run at the same time, and wait for each other where one continues a run of the
other.
"""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

PATIENCE_SECONDS = 400
# `tensor` crosses the processes: both supply the same rows. Sums have four terms.
CROSSING = {"tensor": 4, "expert": 4, "dispatch": "alltoall"}
MIXED = {"data": 2, "tensor": 2, "expert": 2, "dispatch": "alltoall", "fsdp": "parameters"}
# checkpoint_minutes: each step is a checkpoint as soon as the clocks are asked.
TRAIN = {"batch_size": 4, "evaluate_every": 2, "checkpoint_every": 2, "checkpoint_minutes": 1e-6, "roll_back_after": 1}
# The batch from which the mixed run goes back, and the process that is slow.
BAD, SLOW, SLOW_SECONDS = 3, 1, 0.4
FAULTS = {"the folder": 0, "the checksums": 0, "orbax's folders": 0, "the arrays": 0, "the arrays elsewhere": 1}
LARGEST_FILE = 8192  # less than a part of an array, more than what else is written


def bindings(steps: int, plan: dict[str, Any]) -> list[str]:
    settings = {f"PlanConfig.{name}": value for name, value in plan.items()}
    settings |= {f"TrainConfig.{name}": value for name, value in {"steps": steps, **TRAIN}.items()}
    return [f"{name}={value!r}" for name, value in ({"OptimizerConfig.clip_norm": 0.1} | settings).items()]


def command(recipe: Path, run: Path, steps: int, plan: dict[str, Any], *more: str) -> int:
    """The exit status of the command up to step `steps`, in this process."""
    from orogen.cli import _run, make_parser

    bound = [word for binding in bindings(steps, plan) for word in ("--gin_bindings", binding)]
    words = ["train", "--gin_file", str(recipe), "--run", str(run), "--resume", *bound, *more]
    return _run(make_parser().parse_args(words))


def trained(recipe: Path, run: Path, steps: int, plan: dict[str, Any], *, bad: bool = False) -> list[str]:
    """A run without its report, whose batch `BAD` gives no number if `bad`. Returns what it says."""
    import numpy as np

    from orogen.config.load import load
    from orogen.parallel import distributed
    from orogen.train.pretraining import PRETRAINING, train_loader
    from orogen.train.run import train

    def source(config: Any, corpus: Any) -> Any:
        loader, fresh = train_loader(config, corpus), train_loader(config, corpus)
        for _ in range(BAD - 1):
            next(fresh)
        place, honest = fresh.state(), loader.take

        def take(state: Any) -> Any:
            if distributed.count() > 1 and distributed.index() == SLOW:
                time.sleep(SLOW_SECONDS)
            weight = np.float32(np.inf if bad and loader.state() == place else 1)
            batch = honest(state)
            return batch._replace(weights_bt=batch.weights_bt * weight)

        loader.take = take
        return loader

    lines: list[str] = []
    task = dataclasses.replace(PRETRAINING, source=source)
    train(*load([recipe], bindings(steps, plan)), run, task, resume=True, log=lines.append)
    return lines


def by_minutes(recipe: Path, run: Path) -> list[str]:
    """The end of the mixed run on two processes, where only the first one's clock runs."""
    from orogen.parallel import distributed
    from orogen.train import saving

    with contextlib.ExitStack() as patched:
        patched.enter_context(mock.patch.object(saving, "STEPS_BETWEEN_CLOCKS", 1))
        if not distributed.first():
            patched.enter_context(mock.patch.object(saving, "time", SimpleNamespace(monotonic=lambda: 0.0)))
        return trained(recipe, run, 4, MIXED, bad=True)


def wait_for(file: Path) -> None:
    """Waits for what the other program makes."""
    while not file.exists():
        time.sleep(0.05)


@contextlib.contextmanager
def fault(name: str) -> Iterator[None]:
    """While it lasts, this process cannot do a part of a checkpoint's write."""
    from orbax.checkpoint._src.path import atomicity

    from orogen.checkpoint import checksums
    from orogen.checkpoint.steps import Checkpoints

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def full_later(*_: Any, **__: Any) -> None:
        full()

    patches = {
        "the folder": (Checkpoints, "_clear", full),
        "the checksums": (checksums, "write", full),
        "orbax's folders": (atomicity, "_create_paths", full_later),
    }
    if name in patches:
        owner, attribute, fails = patches[name]
        with mock.patch.object(owner, attribute, fails):
            yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing_saves(folder: Path) -> dict[str, Any]:
    """By fault: the error here, after how many seconds, and whether the next checkpoint is whole."""
    import jax
    import numpy as np
    from orbax.checkpoint._src.futures import future

    from orogen.checkpoint.steps import Checkpoints, NotSavedError, with_shardings
    from orogen.model.layout import Whole
    from orogen.parallel import distributed

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    found, step = {}, 0
    with Checkpoints(folder, together=True, keep=1) as checkpoints:
        for name, process in FAULTS.items():
            values = np.random.default_rng(step).normal(size=(jax.device_count(), 4096)).astype(np.float32)
            items = {"model": {"w": jax.make_array_from_callback(values.shape, there, lambda at, v=values: v[at])}}
            began, error = time.monotonic(), ""
            with fault(name) if distributed.index() == process else contextlib.nullcontext():
                try:
                    checkpoints.save(step + 1, items, {"at": step}, Whole("", ""))
                    checkpoints.wait()
                except NotSavedError as raised:
                    error = str(raised)
            seconds, step = time.monotonic() - began, step + 2
            checkpoints.save(step, items, {"at": step}, Whole("", ""))
            checkpoints.wait()
            target = with_shardings(items, jax.tree.map(lambda _: there, items))
            again, position = checkpoints.restore(target)
            parts = [np.array_equal(part.data, values[part.index]) for part in again["model"]["w"].addressable_shards]
            whole = all(parts) and position == {"at": step}
            distributed.from_all(None)
            here = sorted(path.name for path in checkpoints.folder.iterdir())
            found[name] = {"error": error, "seconds": seconds, "whole": whole, "folders": here, "step": step}
    found["threads"] = [thread.name for thread in threading.enumerate() if isinstance(thread, future._SignalingThread)]
    return found


def together(recipe: Path, folder: Path) -> None:
    """The program of the two processes."""
    from orogen.parallel import distributed
    from orogen.parallel.cluster import VARIABLE, read_cluster

    distributed.start(read_cluster(os.environ.pop(VARIABLE), os.environ))
    facts: dict[str, Any] = {"refused": command(recipe, folder / "refused", 2, {"data": 2})}
    facts["began"] = command(recipe, folder / "crossing", 2, CROSSING, "--json")
    facts["wrote"] = [(folder / "crossing" / name).is_file() for name in ("report.html", "samples.txt")]
    (folder / "crossing.begun").touch()
    wait_for(folder / "mixed.begun")
    facts["lines"] = by_minutes(recipe, folder / "mixed")
    facts["saves"] = failing_saves(folder / "saves")
    (folder / f"facts.{distributed.index()}").write_text(json.dumps(facts))


def alone(recipe: Path, folder: Path) -> None:
    """The program of the single process."""
    trained(recipe, folder / "mixed.alone", 2, MIXED)
    shutil.copytree(folder / "mixed.alone", folder / "mixed")
    (folder / "mixed.begun").touch()
    trained(recipe, folder / "mixed.alone", 4, MIXED, bad=True)
    trained(recipe, folder / "crossing.alone", 3, CROSSING)
    wait_for(folder / "crossing.begun")
    trained(recipe, folder / "crossing", 3, CROSSING)


def main() -> None:
    from orogen.parallel.runtime import configure

    late = threading.Timer(PATIENCE_SECONDS, os._exit, (3,))
    late.daemon = True
    late.start()
    program, recipe, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    configure(2 if program == "together" else 4)
    (together if program == "together" else alone)(recipe, folder)


if __name__ == "__main__":
    main()
