"""Times the new runs on one GPU, and appends to `measured.jsonl` those that it lacks.

Each is compiled by a process of its own, all at once; then they are timed one after another, alone on the GPU.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from orogen.bench.turns import Turn, in_turn
from orogen.bench.workload import Workload

STEPS = 10
MEASURED = Path(__file__).parent / "measured.jsonl"


def few_layers(
    model: str, pattern: str, rows: int, length: int, *bindings: str, vocab: int = 65536, part: str = "forward_backward"
) -> dict[str, Any]:
    """A workload with the widths of a model and these layers."""
    own = f"ModelConfig.pattern={pattern!r}", f"ModelConfig.vocab_size={vocab}"
    return {"model": model, "rows": rows, "sequence_length": length, "part": part, "bindings": (*own, *bindings)}


# Widths of published models of which no run is in the other experiments, a few layers deep, and lengths that none has.
NEW: dict[str, dict[str, Any]] = {
    "Transformer 8B's widths, *-*-, 2 microbatches of 4 x 4,096, whole step": few_layers(
        "transformer_8b", "*-*-", 4, 4096, "PlanConfig.microbatches=2", "PlanConfig.unroll=2", part="whole_step"
    ),
    "Nemotron-H 8B's widths, M-*-, 2 x 8,192, both passes": few_layers("nemotron_h_8b", "M-*-", 2, 8192),
    "Qwen3-30B-A3B's widths, *E*E, 4 x 4,096, both passes": few_layers("qwen3_30b_a3b", "*E*E", 4, 4096),
    "Nemotron Nano 9B v2's widths, M-M*-, 2 x 8,192, both passes": few_layers("nemotron_nano_9b_v2", "M-M*-", 2, 8192),
    "Nemotron-H 56B's widths, M-*-, 1 x 8,192, both passes": few_layers("nemotron_h_56b", "M-*-", 1, 8192),
    "Qwen3 8B's widths, *-*-, 2 x 8,192, both passes": few_layers("qwen3_8b", "*-*-", 2, 8192),
    "Mixtral 8x22B's widths, *E, 4 x 4,096, both passes": few_layers("mixtral_8x22b", "*E", 4, 4096, vocab=32768),
    "hybrid_1b, 4 x 8,192, both passes": {"model": "hybrid_1b", "rows": 4, "sequence_length": 8192},
    "r1, 1 x 32,768, both passes": {"model": "r1", "rows": 1, "sequence_length": 32768},
    "r1's widths, MEMEM*E, 4 microbatches of 4 x 4,096, whole step": {
        "model": "r1", "rows": 4, "sequence_length": 4096, "part": "whole_step",
        "bindings": ("ModelConfig.pattern='MEMEM*E'", "PlanConfig.microbatches=4", "PlanConfig.unroll=2"),
    },
    "Nemotron 3 Nano's widths, MEM*E, 2 x 8,192, both passes": few_layers("nemotron3_nano_30b_a3b", "MEM*E", 2, 8192),
    "Nemotron 3 Super's widths, ME*E, 1 x 8,192, both passes": few_layers(
        "nemotron3_super_120b_a12b", "ME*E", 1, 8192, "ModelConfig.mtp_depths=0"
    ),
    "Nemotron Nano 12B v2's widths, M-*-, 2 x 8,192, both passes": few_layers("nemotron_nano_12b_v2", "M-*-", 2, 8192),
    "Qwen3-235B-A22B's widths, *E, 4 x 4,096, both passes": few_layers("qwen3_235b_a22b", "*E", 4, 4096),
    "Llama 3 70B's widths, *-, 2 x 8,192, both passes": few_layers("llama3_70b", "*-", 2, 8192, vocab=32768),
    "Nemotron 3 Nano 4B's widths, M-M*-, 2 microbatches of 2 x 8,192, whole step": few_layers(
        "nemotron3_nano_4b", "M-M*-", 2, 8192, "PlanConfig.microbatches=2", "PlanConfig.unroll=2", part="whole_step"
    ),
    "Mamba-2 8B's widths, MMMM, 2 x 8,192, both passes": few_layers("mamba2_8b", "MMMM", 2, 8192),
}  # fmt: skip


def workload(name: str) -> Workload:
    return Workload(**NEW[name])


def time_one(turn: Turn) -> dict[str, Any]:
    """Compiles the run of that number in NEW, waits for its turn, and times it."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all are compiled at once
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.95"
    from orogen.bench.train import prepare, summarise, timed
    from orogen.parallel.runtime import configure

    configure()
    name = list(NEW)[int(turn.name)]
    work = workload(name)
    prepared = prepare(work, work.config(), ready=turn.wait)
    return {"name": name, **summarise(prepared, timed(prepared.start, STEPS), work.config())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MEASURED, help="where those lines go that MEASURED lacks")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        turn = Turn(options.one[0], Path(options.one[1]))
        turn.answer([time_one(turn)])
        return
    done = {json.loads(line)["name"] for line in MEASURED.read_text().splitlines()}
    missing = [str(number) for number, name in enumerate(NEW) if name not in done]  # names of runs are too long
    results, failures = in_turn(missing, [sys.executable, __file__])
    with options.out.open("a") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in results)
    for number, why in failures.items():
        print(f"{list(NEW)[int(number)]} failed: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
