"""A sweep of 36 runs that is killed again and again: every run ends once. The program is a script that writes a run's
files; `experiments/survival/swept.py` asks the same of trainings."""

import json
import os
import random
import signal
import subprocess
import sys
import time

from tests.helpers import write_recipe

COUNT, KILLS, SLOWEST = 36, 4, 20.0
# A run writes a line when it ends, as the last thing but one.
PROGRAM = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
folder.mkdir(exist_ok=True)
time.sleep(0.1)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "score": 1.0}) + "\\n")
(folder / "env.json").write_text(json.dumps({"parameters": {"total": 7}, "commit": 0, "packages": 0, "devices": 0}))
with open(folder.parents[1] / "ends", "a") as ends:
    ends.write(folder.name + "\\n")
(folder / "report.html").write_text("")
"""
SWEEP = """
import sys
from pathlib import Path
from orogen.config.load import load
from orogen.config.sweep import Arm
from orogen.sweep.plan import Run
from orogen.sweep.results import Results
from orogen.sweep.runner import Runner
recipe, folder, program, count = sys.argv[1:]
config = load([recipe])[0]
runs = [Run(Arm((f"run{n}",), ()), f"run{n}", config) for n in range(int(count))]
Runner(
    Path(folder), Results(Path(folder)), numbers=("score",), at_once=6, environments=[{}], log=print,
    program=(sys.executable, "-S", program),
).run(runs)
"""


def test_no_run_of_a_killed_sweep_ends_twice(tmp_path):
    folder, recipe, rng = tmp_path / "sweep", write_recipe(tmp_path), random.Random(1)
    folder.mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sweep.py").write_text(SWEEP)
    results, ends = folder / "results.jsonl", folder / "ends"
    command = [sys.executable, tmp_path / "sweep.py", recipe, folder, tmp_path / "program.py", str(COUNT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def lines():
        return len(results.read_text().splitlines()) if results.exists() else 0

    def call():
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    for _ in range(KILLS):
        process, until = call(), time.monotonic() + SLOWEST
        before = lines()
        while lines() == before and time.monotonic() < until:  # it has begun to work
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 0 < lines() < COUNT
    assert call().wait(60) == 0
    assert sorted(ends.read_text().split()) == sorted(f"run{n}" for n in range(COUNT))
    assert sorted(json.loads(line)["run"] for line in results.read_text().splitlines()) == sorted(
        f"run{n}" for n in range(COUNT)
    )
