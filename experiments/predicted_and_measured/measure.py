"""Times the new runs on one GPU: `python experiments/predicted_and_measured/measure.py >> measured.jsonl`.

Each that `measured.jsonl` lacks is compiled by a process of its own, all at once; then they are timed one after
another, alone on the GPU.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from orogen.bench.workload import Workload

STEPS = 10
PATIENCE = 300.0  # seconds
MEASURED = Path(__file__).parent / "measured.jsonl"
# Widths of published models of which no run is in the other experiments, a few layers deep, and lengths that none has.
NEW: dict[str, dict[str, Any]] = {
    "Transformer 8B's widths, *-*-, 2 microbatches of 4 x 4,096, whole step": {
        "model": "transformer_8b", "rows": 4, "sequence_length": 4096, "part": "whole_step",
        "bindings": (
            "ModelConfig.pattern='*-*-'", "ModelConfig.vocab_size=65536", "PlanConfig.microbatches=2",
            "PlanConfig.unroll=2",
        ),
    },
    "Nemotron-H 8B's widths, M-*-, 2 x 8,192, both passes": {
        "model": "nemotron_h_8b", "rows": 2, "sequence_length": 8192,
        "bindings": ("ModelConfig.pattern='M-*-'", "ModelConfig.vocab_size=65536"),
    },
    "Qwen3-30B-A3B's widths, *E*E, 4 x 4,096, both passes": {
        "model": "qwen3_30b_a3b", "rows": 4, "sequence_length": 4096,
        "bindings": ("ModelConfig.pattern='*E*E'", "ModelConfig.vocab_size=65536"),
    },
    "Nemotron Nano 9B v2's widths, M-M*-, 2 x 8,192, both passes": {
        "model": "nemotron_nano_9b_v2", "rows": 2, "sequence_length": 8192,
        "bindings": ("ModelConfig.pattern='M-M*-'", "ModelConfig.vocab_size=65536"),
    },
    "Nemotron-H 56B's widths, M-*-, 1 x 8,192, both passes": {
        "model": "nemotron_h_56b", "rows": 1, "sequence_length": 8192,
        "bindings": ("ModelConfig.pattern='M-*-'", "ModelConfig.vocab_size=65536"),
    },
    "Qwen3 8B's widths, *-*-, 2 x 8,192, both passes": {
        "model": "qwen3_8b", "rows": 2, "sequence_length": 8192,
        "bindings": ("ModelConfig.pattern='*-*-'", "ModelConfig.vocab_size=65536"),
    },
    "Mixtral 8x22B's widths, *E, 4 x 4,096, both passes": {
        "model": "mixtral_8x22b", "rows": 4, "sequence_length": 4096,
        "bindings": ("ModelConfig.pattern='*E'", "ModelConfig.vocab_size=32768"),
    },
    "hybrid_1b, 4 x 8,192, both passes": {"model": "hybrid_1b", "rows": 4, "sequence_length": 8192},
    "r1, 1 x 32,768, both passes": {"model": "r1", "rows": 1, "sequence_length": 32768},
    "r1's widths, MEMEM*E, 4 microbatches of 4 x 4,096, whole step": {
        "model": "r1", "rows": 4, "sequence_length": 4096, "part": "whole_step",
        "bindings": ("ModelConfig.pattern='MEMEM*E'", "PlanConfig.microbatches=4", "PlanConfig.unroll=2"),
    },
}  # fmt: skip


def workload(name: str) -> Workload:
    return Workload(**NEW[name])


def time_one(name: str) -> dict[str, Any]:
    """Compiles, says so on a line, waits for a line on stdin, and times."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    from orogen.bench.train import prepare, summarise, timed
    from orogen.parallel.runtime import configure

    configure()
    work = workload(name)
    prepared = prepare(work, work.config())
    print("ready", flush=True)
    sys.stdin.readline()
    return {"name": name, **summarise(prepared, timed(prepared.start, STEPS), work.config())}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(time_one(sys.argv[1])), flush=True)
        return
    began = time.monotonic()
    done = {json.loads(line)["name"] for line in MEASURED.read_text().splitlines()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = {name: subprocess.Popen([sys.executable, __file__, name], **pipes) for name in NEW if name not in done}
    ready = {name: process for name, process in started.items() if process.stdout.readline() == "ready\n"}
    print(f"{len(ready)} of {len(started)} are compiled after {time.monotonic() - began:.0f} s", file=sys.stderr)
    for process in ready.values():
        print(process.communicate("go\n", timeout=PATIENCE)[0], end="", flush=True)
    failed = [name for name, process in started.items() if process.wait()]
    if failed:
        raise RuntimeError(f"these runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
