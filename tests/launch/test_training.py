"""A run on two processes is the run on one: the same metrics and checkpoints, to the bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from orogen.cli import main

RECIPE = """
ModelConfig.pattern = 'E*'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 12
ModelConfig.num_attention_heads = 4
ModelConfig.num_key_value_heads = 2
ModelConfig.head_dim = 4
ModelConfig.n_routed_experts = 4
ModelConfig.num_experts_per_tok = 2
ModelConfig.moe_intermediate_size = 10
DataConfig.corpus = {corpus!r}
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.2
DataConfig.tuning_fraction = 0.0
TrainConfig.batch_size = 4
TrainConfig.sequence_length = 24
TrainConfig.seed = 1
TrainConfig.evaluate_every = 2
TrainConfig.evaluate_rows = 4
TrainConfig.checkpoint_every = 2
TrainConfig.sample_prompts = ('a',)
TrainConfig.sample_tokens = 3
TrainConfig.ngram_order = 0
OptimizerConfig.learning_rate = 1e-2
OptimizerConfig.schedule = 'constant'
OptimizerConfig.clip_norm = 0.1
"""
TIMED = {
    "step_ms", "tokens_per_second", "start_seconds", "compile_seconds", "evaluate_seconds", "save_seconds", "host_ms",
    "device_ms", "slow_processes",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path) -> Path:
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number in range(12):
        text = f"document {number}: " + " ".join(str(number * k % 97) for k in range(1, 40))
        (corpus / f"{number:02}.txt").write_text(text)
    file = tmp_path / "tiny.gin"
    file.write_text(RECIPE.format(corpus=str(corpus)))
    return file


def words(recipe: Path, run: Path, steps: int, plan: dict) -> list[str]:
    """The task up to step `steps`."""
    settings = {"TrainConfig.steps": steps, **{f"PlanConfig.{name}": value for name, value in plan.items()}}
    bindings = [word for name, value in settings.items() for word in ("--gin_bindings", f"{name}={value!r}")]
    return ["train", "--gin_file", str(recipe), "--run", str(run), "--resume", *bindings]


def on_two(task: list[str], devices: int) -> subprocess.CompletedProcess:
    """Runs the task on two processes with `devices` each."""
    launch = ["launch", "local", "--processes", "2", "--", *task, "--fake_devices", str(devices)]
    # As conftest sets it here; everything else comes through the environment.
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-m", "orogen.cli", *launch]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def metrics(run: Path) -> list[dict]:
    """The metrics that do not depend on time."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMED} for record in records]


def arrays(run: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint."""
    found = {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("model", "trainer"):
        handler, folder = ocp.StandardCheckpointHandler(), run / "checkpoints" / str(step) / item
        saved = handler.metadata(folder)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name, leaf in getattr(saved, "tree", saved).items()
        }
        restored = handler.restore(folder, args=ocp.args.StandardRestore(target))
        found |= {f"{item}.{name}": np.asarray(leaf).tobytes() for name, leaf in restored.items()}
    return found


def assert_same(one: Path, two: Path, step: int) -> None:
    assert metrics(one) == metrics(two)
    a, b = arrays(one, step), arrays(two, step)
    assert [name for name in a if a[name] != b[name]] == [] and a.keys() == b.keys()


def test_two_processes_begin_as_one_and_one_goes_on(recipe, tmp_path, capsys):
    """`tensor` crosses the processes: both supply the same rows. Every sum has four terms."""
    plan = {"tensor": 4, "expert": 4, "dispatch": "alltoall"}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for steps in (2, 3):
        assert main(words(recipe, alone, steps, plan)) == 0
    done = on_two([*words(recipe, shared, 2, plan), "--json"], 2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2  # one process answers, and gloo is silent
    assert json.loads((shared / "env.json").read_text())["processes"] == 2
    assert (shared / "report.html").is_file() and (shared / "samples.txt").is_file()
    assert main(words(recipe, shared, 3, plan)) == 0
    assert_same(alone, shared, 3)


def test_one_process_begins_and_two_go_on(recipe, tmp_path, capsys):
    plan = {"data": 2, "tensor": 2, "expert": 2, "dispatch": "alltoall", "fsdp": "parameters"}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main(words(recipe, alone, 2, plan)) == 0
    shutil.copytree(alone, shared)
    assert main(words(recipe, alone, 4, plan)) == 0
    done = on_two(words(recipe, shared, 4, plan), 2)
    assert done.returncode == 0, done.stderr
    assert_same(alone, shared, 4)


def test_a_plan_that_leaves_a_process_without_a_part(recipe, tmp_path):
    done = on_two(words(recipe, tmp_path / "run", 2, {"data": 2}), 2)
    assert done.returncode == 2
    assert "PlanConfig asks for 2 devices; expected the 4 that the 2 processes have" in done.stderr
