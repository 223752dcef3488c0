"""Trains the arms of study.gin on associative recall, with only the answers in the loss, and asks for longer lists too.

PYTHONPATH=src:. python experiments/phonebook/run.py --run runs/phonebook
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from experiments.packed import turn

from orogen.checkpoint.open import Opened
from orogen.config.load import load_arm, load_sweep
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data.packing import Batch
from orogen.evaluate.likelihood import Row, Scorer
from orogen.evaluate.suites.example import generator
from orogen.evaluate.suites.recall import mqar
from orogen.evaluate.suites.run import accuracies
from orogen.model.count import count
from orogen.parallel.runtime import configure
from orogen.sweep.plan import Arms
from orogen.sweep.results import Results
from orogen.train.next_token import NEXT_TOKEN
from orogen.train.optimizer import make_optimizer
from orogen.train.run_folder import environment
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

STUDY = Path(__file__).parent / "study.gin"
WORDS, START, HELD_OUT = np.arange(2, 130), 1, 256
LENGTHS = (64, 128, 256)  # 4, 8 and 16 pairs
TESTING = 0  # seed of the examples that are asked for, which no run has


def rows(seed: int, numbers: range, length: int) -> list[Row]:
    return [mqar(generator(seed, "mqar", length, n), WORDS, start=START, length=length) for n in numbers]


def batch(made: list[Row]) -> Batch:
    tokens_bt, asked_bt = (np.stack(arrays) for arrays in zip(*made, strict=True))
    positions_bt = np.broadcast_to(np.arange(tokens_bt.shape[1], dtype=np.int32), tokens_bt.shape)
    return Batch(tokens_bt, np.ones_like(tokens_bt), positions_bt, asked_bt.astype(np.float32))


class Arm:
    """The compiled programs of one arm; a seed is in none of them."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.plan, self.built = assemble(config.model, config.plan, length=config.train.sequence_length)
        self.updates = make_optimizer(config.optimizer, config.train.steps, self.built.params)
        self.step = make_step(self.built, NEXT_TOKEN, config, self.plan, self.updates)
        self.scorer = Scorer(Opened(config.model, self.plan, self.built, self.built.params, self.built.buffers, None))
        self.parameters, self.known = count(config.model)["total"], environment()

    def batches(self, seed: int, steps: int) -> list[Batch]:
        size, length = self.config.train.batch_size, self.config.train.sequence_length
        return [batch(rows(seed, range(n * size, (n + 1) * size), length)) for n in range(steps)]

    def train(self, seed: int, batches: list[Batch]) -> dict[str, float]:
        """The share of the answers' tokens by length, after a step with each batch."""
        state = create_state(self.config.model, self.built, self.updates, self.plan, seed)
        for made in batches:
            state, _ = self.step(state, batch_to_devices(made, self.plan))
        found = {}
        for length in LENGTHS:
            scores = self.scorer.score(rows(TESTING, range(HELD_OUT), length), (state.params, state.buffers))
            found[f"mqar@{length}"] = accuracies(scores)["token_accuracy"]
        return found

    def result(self, seed: int, lock: Path | None) -> dict[str, Any]:
        """What a result says of the trained model, and the seconds. lock: see `turn`."""
        batches = self.batches(seed, self.config.train.steps)
        with turn(lock):
            began = time.perf_counter()
            (metric, value), *further = self.train(seed, batches).items()
        return {
            "metric": metric, "value": value, "further": dict(further),
            "seconds": round(time.perf_counter() - began, 1), "parameters": self.parameters,
            **{name: self.known[name] for name in ("commit", "packages", "devices")},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", type=Path, default=STUDY, metavar="STUDY")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where results.jsonl is written")
    parser.add_argument("--arms", default="", metavar="NAME,NAME", help="those to run; all by default")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="of all processes that train in turn")
    options = parser.parse_args()
    study = [options.gin_file]
    sweep, _ = load_sweep(study)
    names = list(dict.fromkeys(arm.name for arm in sweep.arms()))
    chosen = options.arms.split(",") if options.arms else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--arms has {unknown[0]!r}; expected some of {', '.join(names)}")
    options.run.mkdir(parents=True, exist_ok=True)
    configure(0)  # compiled programs are kept between processes
    results = Results(options.run, sweep.numbers)
    runs = Arms(sweep, {arm: load_arm(study, (), arm) for arm in sweep.arms()}).runs({})
    for name in chosen:
        waiting = [run for run in runs if run.arm.name == name and results.of(run) is None]
        if not waiting:
            continue
        arm = Arm(waiting[0].config)
        arm.train(0, arm.batches(0, 1))  # compiles
        for run in waiting:
            facts = arm.result(run.config.train.seed, options.lock)
            results.add(run, facts)
            print(run.name, facts, flush=True)


if __name__ == "__main__":
    main()
