"""Trains models of one and two layers on generated suites and evaluates them on others of the same kind.

PYTHONPATH=src python experiments/synthetic_suites/run.py          trains and draws
PYTHONPATH=src python experiments/synthetic_suites/run.py --draw   draws results.jsonl
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.cost.assemble import assemble
from orogen.data.packing import Batch
from orogen.evaluate.likelihood import Row, Scorer
from orogen.evaluate.suites.example import generator
from orogen.evaluate.suites.recall import induction, mqar
from orogen.evaluate.suites.run import accuracies
from orogen.train.next_token import NEXT_TOKEN
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

HERE = Path(__file__).parent
SUITES = {"mqar": mqar, "induction": induction}
MODELS = ("*", "**", "MM", "M*")
WORDS, START, LENGTH, BATCH = np.arange(2, 130), 1, 64, 32
STEPS, EVERY, HELD_OUT, ENOUGH = 1500, 125, 256, 0.99
TRAINING, TESTING = 0, 1  # seeds of the examples


def model(pattern: str) -> ModelConfig:
    return ModelConfig(
        pattern=pattern, vocab_size=130, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        rope_theta=1e4, mamba_num_heads=2, mamba_head_dim=32, n_groups=1, ssm_state_size=16, chunk_size=64,
    )  # fmt: skip


def rows(suite: str, seed: int, numbers: range) -> list[Row]:
    make = SUITES[suite]
    return [make(generator(seed, suite, LENGTH, number), WORDS, start=START, length=LENGTH) for number in numbers]


def batch(made: list[Row]) -> Batch:
    tokens_bt, asked_bt = (np.stack(arrays) for arrays in zip(*made, strict=True))
    segments_bt = np.ones_like(tokens_bt)
    positions_bt = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_bt.shape)
    return Batch(tokens_bt, segments_bt, positions_bt, asked_bt.astype(np.float32))


def train(name: str, suite: str) -> list[dict[str, Any]]:
    """One line per evaluation."""
    settings = TrainConfig(steps=STEPS, batch_size=BATCH, sequence_length=LENGTH, seed=0)
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=100)
    config = RunConfig(model=model(name), plan=PlanConfig(), train=settings, optimizer=optimizer)
    plan, built = assemble(config.model, config.plan, length=LENGTH)
    updates = make_optimizer(config.optimizer, STEPS, built.params)
    state = create_state(config.model, built, updates, plan, settings.seed)
    step = make_step(built, NEXT_TOKEN, config, plan, updates)
    scorer = Scorer(Opened(config.model, plan, built, built.params, built.buffers, None))
    held_out, found, began = rows(suite, TESTING, range(HELD_OUT)), [], time.perf_counter()
    for number in range(1, STEPS + 1):
        taken = rows(suite, TRAINING, range((number - 1) * BATCH, number * BATCH))
        state, metrics = step(state, batch_to_devices(batch(taken), plan))
        if number % EVERY == 0:
            scores = accuracies(scorer.score(held_out, (state.params, state.buffers)))
            seconds = round(time.perf_counter() - began, 1)
            facts = {"suite": suite, "model": name, "step": number, "seconds": seconds, "loss": float(metrics.loss)}
            found.append({**facts, **scores})
            print(json.dumps(found[-1]), flush=True)
            if scores["accuracy"] >= ENOUGH:
                break
    return found


def draw() -> None:
    """One panel per suite: token accuracy over steps."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, suite in zip(figure.subplots(1, 2, sharey=True), SUITES, strict=True):
        for name, marker in zip(MODELS, "osD^", strict=True):
            of = [line for line in lines if line["suite"] == suite and line["model"] == name]
            axes.plot([line["step"] for line in of], [line["token_accuracy"] for line in of], marker=marker, label=name)
        axes.set(title=suite, xlabel="training steps", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the answers' tokens")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(HERE / "figure.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw")
    if not parser.parse_args().draw:
        with (HERE / "results.jsonl").open("w") as out:
            for suite in SUITES:
                for name in MODELS:
                    out.writelines(json.dumps(line) + "\n" for line in train(name, suite))
                    out.flush()
    draw()


if __name__ == "__main__":
    main()
