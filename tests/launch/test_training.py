"""A run on two processes is the run on one: the same metrics and checkpoints, to the bit.

All runs here are processes of their own, compiled as users' are: under the flags with which other tests compile fast,
XLA:CPU does not compile the optimizer's update to the same code in both kinds of run (observed with jax 0.10.1).
"""

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
TIMED = ("_ms", "_seconds", "_per_second", "_processes")  # how the names of metrics of time end


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


def orogen(*words: str) -> subprocess.CompletedProcess:
    """The command line, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "-m", "orogen.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done


def on_one(task: list[str]) -> None:
    """Runs the task on one process with four devices."""
    assert orogen(*task, "--fake_devices", "4").returncode == 0


def on_two(task: list[str]) -> subprocess.CompletedProcess:
    """Runs the task on two processes with two devices each."""
    return orogen("launch", "local", "--processes", "2", "--", *task, "--fake_devices", "2")


def metrics(run: Path) -> list[dict]:
    """The metrics that do not depend on time."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.endswith(TIMED)} for record in records]


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
    """Whole scores of the last step of a part are left out: an uninterrupted run does not have them."""
    sampled = lambda run: [{k: v for k, v in one.items() if not k.startswith("whole")} for one in metrics(run)]  # noqa: E731
    assert sampled(one) == sampled(two)
    a, b = arrays(one, step), arrays(two, step)
    assert [name for name in a if a[name] != b[name]] == [] and a.keys() == b.keys()


def test_two_processes_begin_as_one_and_one_goes_on(recipe, tmp_path):
    """`tensor` crosses the processes: both supply the same rows. Sums have four terms."""
    plan = {"tensor": 4, "expert": 4, "dispatch": "alltoall"}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    on_one(words(recipe, alone, 3, plan))
    done = on_two([*words(recipe, shared, 2, plan), "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2  # one process answers, and gloo is silent
    assert json.loads((shared / "env.json").read_text())["processes"] == 2
    assert (shared / "report.html").is_file() and (shared / "samples.txt").is_file()
    on_one(words(recipe, shared, 3, plan))
    assert_same(alone, shared, 3)


def test_one_process_begins_and_two_go_on(recipe, tmp_path):
    plan = {"data": 2, "tensor": 2, "expert": 2, "dispatch": "alltoall", "fsdp": "parameters"}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    on_one(words(recipe, alone, 2, plan))
    shutil.copytree(alone, shared)
    on_one(words(recipe, alone, 3, plan))
    done = on_two(words(recipe, shared, 3, plan))
    assert done.returncode == 0, done.stderr
    assert_same(alone, shared, 3)


def test_a_plan_that_leaves_a_process_without_a_part(recipe, tmp_path):
    done = on_two(words(recipe, tmp_path / "run", 2, {"data": 2}))
    assert done.returncode == 2
    assert "PlanConfig asks for 2 devices; expected the 4 that the 2 processes have" in done.stderr
