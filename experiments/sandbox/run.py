"""Verifications per second of programs in the sandbox, through the processes that verify in a run.

PYTHONPATH=src:. python experiments/sandbox/run.py --count 200 --workers 2            # with bubblewrap
PYTHONPATH=src:. python experiments/sandbox/run.py --count 200 --workers 2 --unsandboxed
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


def measured(count: int, workers: int, *, unsandboxed: bool) -> dict[str, Any]:
    """The wall clock of verifying `count` right programs, once every process has started.
    Each verification runs a check of four calls in one process, and the program in another."""
    config = EnvironmentConfig(name="code", kind="code", examples=count, unsandboxed=unsandboxed)
    environment = make_environment(config)
    asked = []
    for number in range(count):
        source = right(environment.example(number).messages[0]["content"])
        asked.append(Asked(number, None, Said(source, f"```python\n{source}```")))
    pool = Pool(config, workers=workers)
    pool.verify(asked[: 2 * workers])
    began = time.perf_counter()
    found = pool.verify(asked)
    wall = time.perf_counter() - began
    pool.close()
    passed = sum(isinstance(one, Turn) and one.rewards == {"tests": 1.0} for one in found)
    return {
        "bubblewrap": not unsandboxed, "workers": workers, "verifications": count, "passed": passed, "seconds": wall,
        "per_second": count / wall, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="verifications")
    parser.add_argument("--workers", type=int, default=2, help="processes that verify")
    parser.add_argument("--unsandboxed", action="store_true", help="without bubblewrap")
    parser.add_argument("--record", type=Path, default=HERE / "results.jsonl", help="gets a line")
    options = parser.parse_args()
    line = measured(options.count, options.workers, unsandboxed=options.unsandboxed)
    print(json.dumps(line))
    with options.record.open("a") as file:
        print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
