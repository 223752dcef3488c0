"""Verifications per second of programs in the sandbox, through the processes that verify in a run.

PYTHONPATH=src:. python experiments/sandbox/run.py --count 200 --workers 2            # with bubblewrap
PYTHONPATH=src:. python experiments/sandbox/run.py --count 200 --workers 2 --unsandboxed

With --cgroup, what a verification costs in processor time: the folder of an empty cgroup with `cpuacct.usage` (of
version 1), which this process joins. It counts processes that were killed, which `getrusage` does not.

mkdir /sys/fs/cgroup/cpuacct/sandbox
PYTHONPATH=src:. python experiments/sandbox/run.py --count 12 --cgroup /sys/fs/cgroup/cpuacct/sandbox
"""

import argparse
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Said, Turn
from orogen.posttrain.environments.make import make_environment
from orogen.posttrain.environments.pool import Asked, Pool

HERE = Path(__file__).parent
ASKED = re.compile(r"function (\w+)\(x\) that returns (\d+ [-+*]) x, plus (\d+)")


def right(prompt: str) -> str:
    """The program that a generated task asks for."""
    found = ASKED.search(prompt)
    assert found is not None
    return f"def {found[1]}(x):\n    return {found[2]} x + {found[3]}\n"


def code_of(count: int, *, unsandboxed: bool) -> EnvironmentConfig:
    """Tasks whose verification runs a check of four calls in one process, and the program in another."""
    return EnvironmentConfig(name="code", kind="code", examples=count, unsandboxed=unsandboxed)


def answers(environment: Any) -> list[Asked]:
    """A right program for each task."""
    asked = []
    for number in range(len(environment)):
        source = right(environment.example(number).messages[0]["content"])
        asked.append(Asked(number, None, Said(source, f"```python\n{source}```")))
    return asked


def passes(turn: Any) -> bool:
    return isinstance(turn, Turn) and turn.rewards == {"tests": 1.0}


def measured(count: int, workers: int, *, unsandboxed: bool) -> dict[str, Any]:
    """The wall clock of verifying `count` right programs, once every process has started."""
    config = code_of(count, unsandboxed=unsandboxed)
    asked = answers(make_environment(config))
    pool = Pool(config, workers=workers)
    pool.verify(asked[: 2 * workers])
    began = time.perf_counter()
    found = pool.verify(asked)
    wall = time.perf_counter() - began
    pool.close()
    return {
        "bubblewrap": not unsandboxed, "workers": workers, "verifications": count, "passed": sum(map(passes, found)),
        "seconds": wall, "per_second": count / wall, **machine(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    return {"cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}


def processor_time(count: int, cgroup: Path, interpreters: int, *, unsandboxed: bool) -> dict[str, Any]:
    """Milliseconds of processor time per verification, of all processes that it starts and of this one."""
    environment = make_environment(code_of(count, unsandboxed=unsandboxed))
    asked = answers(environment)
    usage = cgroup / "cpuacct.usage"
    (cgroup / "tasks").write_text(str(os.getpid()))
    try:
        before = int(usage.read_text())
        passed = sum(passes(environment.step(environment.example(one.number), None, one.said)) for one in asked)
        spent = int(usage.read_text()) - before
    finally:
        (cgroup.parent / "tasks").write_text(str(os.getpid()))
    return {
        "bubblewrap": not unsandboxed, "interpreters": interpreters, "verifications": count, "passed": passed,
        "processor_ms": spent / 1e6 / count, **machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="verifications")
    parser.add_argument("--workers", type=int, default=2, help="processes that verify")
    parser.add_argument("--unsandboxed", action="store_true", help="without bubblewrap")
    parser.add_argument("--cgroup", type=Path, help="measures processor time, of this process alone")
    parser.add_argument("--interpreters", type=int, default=1, help="what the line says of the code that is measured")
    parser.add_argument("--record", type=Path, default=HERE / "results.jsonl", help="gets a line")
    options = parser.parse_args()
    if options.cgroup is None:
        line = measured(options.count, options.workers, unsandboxed=options.unsandboxed)
    else:
        line = processor_time(
            options.count, options.cgroup, options.interpreters, unsandboxed=options.unsandboxed
        )  # fmt: skip
    print(json.dumps(line))
    with options.record.open("a") as file:
        print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
