"""R1's forward and backward pass in bfloat16 and with FP8 dense products, in turn in one process on one GPU.

PYTHONPATH=src python experiments/gpu_throughput/fp8.py --steps 10 --turns 3     # needs 90 GB
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from orogen.bench.train import prepare, rates, timed
from orogen.bench.workload import Workload
from orogen.parallel.runtime import configure

PLANS = {"bfloat16": (), "fp8": ("PlanConfig.linear = 'fp8'",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="r1", help="name of a file in gin_configs/models")
    parser.add_argument("--steps", type=int, default=10, help="timed passes of each program in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, help="sequences per pass")
    parser.add_argument("--sequence_length", type=int, default=8192)
    parser.add_argument("--gin_bindings", action="append", default=[], help="bindings of both programs")
    options = parser.parse_args()
    configure()
    shape: dict[str, Any] = {"model": options.model, "rows": options.rows, "sequence_length": options.sequence_length}
    works = {name: Workload(**shape, bindings=(*options.gin_bindings, *plan)) for name, plan in PLANS.items()}
    configs = {name: work.config() for name, work in works.items()}
    with ThreadPoolExecutor() as pool:  # both compile at once
        programs = dict(zip(PLANS, pool.map(prepare, works.values(), configs.values()), strict=True))
    turns: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.turns):
        for name, program in programs.items():
            turns[name] += timed(program.start, options.steps)
    found: dict[str, Any] = {"bench": "fp8", "model": options.model, "device": jax.devices()[0].device_kind}
    for name, program in programs.items():
        model = configs[name].model
        facts = rates(turns[name], program.tokens, model, options.sequence_length)
        found[name] = {"loss": program.loss, **facts, **program.memory}
    of_turn = lambda name, k: statistics.median(turns[name][k * options.steps : (k + 1) * options.steps])  # noqa: E731
    found["ratios"] = [round(of_turn("bfloat16", k) / of_turn("fp8", k), 4) for k in range(options.turns)]
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
