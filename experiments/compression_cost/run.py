"""CPU time of a distillation step beside the passes that it contains, and of pruning's statistics beside a forward
pass.

PYTHONPATH=src taskset -c 0 python experiments/compression_cost/run.py
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from orogen.bench.cpu_train import random_batch, training_step
from orogen.checkpoint.open import Opened
from orogen.compress.calibrate import Calibration, _documents
from orogen.config.distill import DistillConfig
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.cost.assemble import assemble
from orogen.model.lm import initial_state
from orogen.parallel.axes import STREAM
from orogen.posttrain.distill import make_objective
from orogen.posttrain.teacher import Teacher
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

HERE = Path(__file__).parent
SHAPE = {"batch_size": 1, "sequence_length": 512}
ROUNDS, WARM_UP = 3, 1
NARROWER = {
    "dense": {"intermediate_size": 1536, "mamba_num_heads": 12},
    "moe": {"moe_intermediate_size": 384, "moe_shared_expert_intermediate_size": 768, "mamba_num_heads": 12},
}


class InMemory(SimpleNamespace):
    """A folder with a model that was never saved."""

    plan, masters = None, False

    def read(self, built: Any, plan: Any, dtype: str) -> Any:
        return initial_state(self.config, 0)


def distillation_step(teacher: ModelConfig, student: ModelConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A step of distillation, and the teacher's forward pass alone."""
    train = TrainConfig(steps=1000, seed=0, **SHAPE)
    optimizer_config = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    parts = {"model": student, "plan": PlanConfig(), "train": train, "optimizer": optimizer_config}
    config = RunConfig(**parts, distill=DistillConfig(divergence=1.0)).check()
    plan, built = assemble(student, config.plan, length=train.sequence_length)
    frozen = Teacher(InMemory(config=teacher), config, plan, top_k=None)
    optimizer = make_optimizer(optimizer_config, train.steps, built.params)
    run = make_step(built, make_objective(config.distill), config, plan, optimizer, frozen=frozen.variables)
    held = [create_state(student, built, optimizer, plan, train.seed)]
    batch = random_batch(student.vocab_size, *SHAPE.values())
    placed = batch_to_devices(batch, plan)

    def step() -> Any:
        held[0], metrics = run(held[0], placed._replace(extras=frozen.extras(batch)), frozen.variables)
        return held[0], metrics

    return step, lambda: frozen.extras(batch)


def scoring(model: ModelConfig) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The statistics of all layers, and a forward pass, up to the final hidden states."""
    plan, built = assemble(model, PlanConfig(), length=SHAPE["sequence_length"])
    calibration = Calibration(Opened(model, plan, built, *initial_state(model, 0), None))
    batch = batch_to_devices(random_batch(model.vocab_size, *SHAPE.values()), plan)

    def forward(params: Any, buffers: Any, batch: Any) -> Any:
        return calibration._model(params, buffers).hidden(batch.tokens_bt, _documents(batch), plan)[0]

    forward = calibration._jitted(forward, (), plan.spec(*STREAM))
    weights = calibration._weights
    return lambda: calibration._statistics(*weights, batch), lambda: forward(*weights, batch)


def cpu_seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - began


def compare(name: str) -> dict[str, Any]:
    teacher = load([f"gin_configs/models/bench_{name}.gin"])[0].model
    assert teacher is not None
    student = dataclasses.replace(teacher, **NARROWER[name])
    step, known = distillation_step(teacher, student)
    measured, forward = scoring(teacher)
    calls = {"distillation": step, "teacher": known, "student": training_step(student, **SHAPE)[0],
             "statistics": measured, "forward": forward}  # fmt: skip
    rounds = [{what: cpu_seconds(call) for what, call in calls.items()} for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    ratio = [one["distillation"] / (one["teacher"] + one["student"]) for one in rounds]
    speed = [one["forward"] / one["statistics"] for one in rounds]
    seconds = {what: round(statistics.median(one[what] for one in rounds), 3) for what in calls}
    found = {"distillation_ratio": ratio, "statistics_speed": speed}
    spread = {what: [round(value, 3) for value in sorted(values)] for what, values in found.items()}
    return {"model": name, "rounds": ROUNDS, "cpu_seconds": seconds} | {
        what: {"median": statistics.median(values), "all": values} for what, values in spread.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(NARROWER), choices=list(NARROWER))
    lines = []
    for name in parser.parse_args().models:
        lines.append(json.dumps(compare(name)))
        print(lines[-1], flush=True)
    (HERE / "results.jsonl").write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
