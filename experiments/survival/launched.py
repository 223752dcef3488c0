"""Runs of two processes under `orogen launch local`, one of which is killed; and processes that nobody joins.

A trial arms the process that it kills through Python's `sitecustomize`: everything else is the command that users type.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.train import kills

from orogen.launch.local import free_port

ROOT = Path(__file__).parents[2]
MOMENTS = ("loading", "compiling", "stepping", "evaluating", "saving")
SITE = """import os
if 'OROGEN_CLUSTER' in os.environ:
    from experiments.survival import launched
    launched.arm()
"""
PLAN = "PlanConfig.data=2"
COMMAND = (sys.executable, "-m", "orogen.cli")
NOBODY = {
    "process 0 does not start": "127.0.0.1:{port},2,1",
    "process 1 does not start": "127.0.0.1:{port},2,0",
    "no such coordinator": "192.0.2.1:9,2,1",  # an address for documentation, which no network has (RFC 5737)
}

Facts = dict[str, Any]


def arm() -> None:
    """Lets this process be killed as `TRIAL` says, if it is the one, and if no process was before."""
    from orogen.report import page

    # Drawing takes a third of a run's time here, and no part in what is asked.
    page.pictures = lambda *_: []  # pyright: ignore[reportPrivateImportUsage]
    trial = json.loads(os.environ["TRIAL"])
    if not trial or not os.environ.get("OROGEN_CLUSTER", "").endswith(f",2,{trial['process']}"):
        return
    try:
        Path(trial["armed"]).touch(exist_ok=False)
    except FileExistsError:
        return
    kills.interrupt(trial["moment"], "SIGKILL", trial["call"], trial["seconds"], before=Path(trial["armed"]).touch)


def environment(folder: Path, trial: Facts | None) -> dict[str, str]:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    given = filter(None, [os.environ.get("PYTHONPATH")])
    path = os.pathsep.join(map(str, (folder / "site", ROOT, ROOT / "src", *given)))
    # What `orogen` sets before it imports jax, which `arm` does earlier.
    return {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "TRIAL": json.dumps(trial)}


def launched(recipe: Path, run_dir: Path, trial: Facts | None, folder: Path) -> tuple[int, list[tuple[float, str]]]:
    """The exit status of the launcher, and its own lines with the time at which each came."""
    task = ["train", "--gin_file", recipe, "--run", run_dir, "--fake_devices", "1", "--gin_bindings", PLAN]
    words = ["launch", "local", "--processes", "2", "--restarts", "1", "--logs", f"{run_dir}.logs", "--", *task]
    process = subprocess.Popen(
        [*COMMAND, *map(str, words)], env=environment(folder, trial), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines = [(time.time(), line.rstrip()) for line in process.stderr if line.startswith("orogen: process ")]
    return process.wait(), lines


def trial(number: int, seed: int, recipe: Path, folder: Path, expected: Facts) -> Facts:
    """Each process at each moment in turn; the call and the delay are random."""
    rng = random.Random(seed * 100_003 + number)
    moment, process = MOMENTS[number // 2 % len(MOMENTS)], number % 2
    _, _, calls, longest = kills.MOMENTS[moment]
    facts: Facts = {"moment": moment, "process": process, "call": rng.randint(1, calls)}
    facts |= {"seconds": round(rng.uniform(0, longest), 3), "armed": str(folder / f"armed{number}")}
    run_dir, began = folder / f"launched{number}", time.time()
    status, lines = launched(recipe, run_dir, facts, folder)
    ended = time.time()
    named = [line for _, line in lines if f"process {process} of 2" in line and "was killed by SIGKILL" in line]
    wrong = [] if status == 0 else [f"status {status}"]
    wrong += [] if len(named) == len(lines) == 1 else [f"expected one line that names the process: {lines}"]
    if status == 0:
        wrong += [] if kills.facts_of(run_dir) == expected else ["another curve, or other samples"]
        wrong += [f"left {left} at the end" for left in kills.leftovers(run_dir)]
        facts |= kills.going_on(run_dir)
    del facts["armed"]
    facts |= {"said": [line for _, line in lines], "whole_s": round(ended - began, 1)}
    if lines:
        killed = (folder / f"armed{number}").stat().st_mtime
        facts["named_after_s"] = round(lines[0][0] - killed, 1)
    return {"kind": "kill of one of two", "number": number} | facts | {"wrong": wrong}


def trials(count: int, first: int, seed: int, recipe: Path, folder: Path) -> Iterator[Facts]:
    """`count` kills, from number `first` on."""
    status, lines = launched(recipe, folder / "whole of two", None, folder)
    if status or lines:
        raise SystemExit(f"the launched run that nobody interrupts ended with status {status}: {lines}")
    expected = kills.facts_of(folder / "whole of two")
    for number in range(first, first + count):
        yield trial(number, seed, recipe, folder, expected)


def nobody_there(recipe: Path, folder: Path) -> Iterator[Facts]:
    """Processes that wait for others in vain, all at once."""
    words = ["train", "--gin_file", str(recipe), "--run", str(folder / "nobody"), "--gin_bindings", PLAN]
    began, waiting = time.monotonic(), {}
    for name, cluster in NOBODY.items():
        command = [*COMMAND, *words, "--cluster", cluster.format(port=free_port())]
        waiting[name] = subprocess.Popen(
            command, env=environment(folder, None), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    for name, process in waiting.items():
        said = process.communicate()[1].splitlines()
        seconds = round(time.monotonic() - began, 1)
        wrong = [] if len(said) == 1 and seconds < 60 and process.returncode == 1 else [str(said)]
        yield {"kind": name, "status": process.returncode, "said": said, "seconds": seconds, "wrong": wrong}
