"""Times a training step, and reads its bytes, with activations and optimizer state on the GPU or in the host's memory.

`python experiments/activation_memory/offload.py` on a machine with one GPU writes offload.jsonl beside itself;
`--layers N` and `--length T` make the model smaller. It is the first layers of R1; names of activations that none of
these layers has are refused.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.parallel.runtime import configure
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

FOLDER = Path(__file__).parent
FIELDS = ("argument_size_in_bytes", "temp_size_in_bytes", "host_argument_size_in_bytes", "host_temp_size_in_bytes")
ACTIVATIONS = ("input", "in_proj", "gated_norm", "attention")
CASES: dict[str, dict[str, Any]] = {
    "kept": {"remat": "paper"},
    "activations offloaded": {"remat": "paper", "offload": ACTIVATIONS},
    "selective": {"remat": "selective"},
    "selective, inputs offloaded": {"remat": "selective", "offload": ("input",)},
    "full": {"remat": "full"},
    "full, inputs offloaded": {"remat": "full", "offload": ("input",)},
    "kept, optimizer offloaded": {"remat": "paper", "offload_optimizer": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default: all cases")
    parser.add_argument("--kernels", default="cudnn,triton,mosaic", help="of attention, SSD and experts")
    options = parser.parse_args()
    configure(None)
    model = load([FOLDER.parents[1] / "gin_configs" / "models" / "r1.gin"])[0].model
    model = dataclasses.replace(model, pattern=model.pattern[: options.layers])
    with (FOLDER / "offload.jsonl").open("w") as out:
        for record in measure(model, options):
            print(json.dumps(record), file=out, flush=True)
            print(json.dumps(record), flush=True)


def measure(model: ModelConfig, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record per case: the compiled step's bytes on the device and in the host's memory, and its median seconds."""
    kernels = dict(zip(("attention", "ssd", "grouped_matmul"), options.kernels.split(","), strict=True))
    train = TrainConfig(
        steps=100, batch_size=options.rows, sequence_length=options.length, seed=0, compute_dtype="bfloat16"
    )
    for name in options.case or CASES:
        plan = PlanConfig(**kernels, **CASES[name])
        optimizer = OptimizerConfig(learning_rate=1e-4, schedule="constant")
        config = RunConfig(model=model, plan=plan, train=train, optimizer=optimizer).check()
        yield {"case": name, "device": jax.devices()[0].device_kind, "layers": options.layers,
               "rows": options.rows, "length": options.length, **step_facts(config)}  # fmt: skip


def step_facts(config: RunConfig, *, steps: int = 8) -> dict[str, Any]:
    """The bytes and the median seconds of a step; the first two steps are not counted."""
    plan, built = make_plan(config.plan, config.model), build(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, built.params)
    state = create_state(config.model, built, optimizer, plan, 0)
    batch = batch_to_devices(_batch(config), plan)
    step: Any = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    program = step.lower(state, batch).compile()
    analysis, seconds, loss = program.memory_analysis(), [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = program(state, batch)
        loss = float(jax.block_until_ready(metrics).loss)
        seconds.append(time.perf_counter() - start)
    facts = {field: int(getattr(analysis, field)) for field in FIELDS}
    return {**facts, "seconds": float(np.median(seconds[2:])), "loss": loss}


def _batch(config: RunConfig) -> Batch:
    shape = (config.train.batch_size, config.train.sequence_length)
    tokens_bt = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    positions_bt = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens_bt, np.ones(shape, np.int32), positions_bt, np.ones(shape, np.float32))


if __name__ == "__main__":
    main()
