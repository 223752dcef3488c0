"""Trains the arms of study.gin on associative recall, with only the answers in the loss, and asks for longer lists too.

PYTHONPATH=src python experiments/phonebook/run.py --run runs/phonebook
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

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


def train(config: RunConfig) -> dict[str, Any]:
    """What a result says of the trained model: the share of the answers' tokens by length, and the seconds."""
    settings, began = config.train, time.perf_counter()
    plan, built = assemble(config.model, config.plan, length=settings.sequence_length)
    updates = make_optimizer(config.optimizer, settings.steps, built.params)
    state = create_state(config.model, built, updates, plan, settings.seed)
    step = make_step(built, NEXT_TOKEN, config, plan, updates)
    for number in range(settings.steps):
        taken = range(number * settings.batch_size, (number + 1) * settings.batch_size)
        made = batch(rows(settings.seed, taken, settings.sequence_length))
        state, _ = step(state, batch_to_devices(made, plan))
    scorer = Scorer(Opened(config.model, plan, built, built.params, built.buffers, None))
    found = {}
    for length in LENGTHS:
        scores = scorer.score(rows(TESTING, range(HELD_OUT), length), (state.params, state.buffers))
        found[f"mqar@{length}"] = accuracies(scores)["token_accuracy"]
    (metric, value), *further = found.items()
    seconds = round(time.perf_counter() - began, 1)
    return {
        "metric": metric, "value": value, "further": dict(further), "seconds": seconds,
        "parameters": count(config.model)["total"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="where results.jsonl is written")
    folder = parser.parse_args().run
    folder.mkdir(parents=True, exist_ok=True)
    configure(0)  # compiled programs are kept between runs
    sweep, _ = load_sweep([STUDY])
    results = Results(folder, sweep.numbers)
    for run in Arms(sweep, {arm: load_arm([STUDY], (), arm) for arm in sweep.arms()}).runs({}):
        if results.of(run) is None:
            facts = train(run.config)
            results.add(run, facts)
            print(run.name, facts, flush=True)


if __name__ == "__main__":
    main()
