"""A run folder: what it holds, kill and resume, SIGTERM, another mesh, which runs may use it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.train.runs import STEPS, curve, run

from orogen.checkpoint.open import open_model
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.data.tokenizer import Tokenizer
from orogen.report.metrics import read_metrics
from orogen.train.lock import RunLock
from orogen.train.loop import NonFiniteError
from orogen.train.pretraining import PRETRAINING
from orogen.train.run import train


def test_the_folder_holds_what_it_should(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.gin", "env.json", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer"} <= names
    environment = json.loads((whole / "env.json").read_text())
    assert {"commit", "packages", "devices", "seed", "data", "parameters"} <= set(environment)


def test_every_step_has_its_metrics(whole):
    records = read_metrics(whole)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    keys = {
        "loss",
        "tokens",
        "tokens_per_second",
        "step_ms",
        "grad_norm",
        "learning_rate",
        "expert_load",
        "dropped_tokens",
    }
    assert all(keys <= set(record) for record in records)
    assert [r["step"] for r in records if "heldout_loss" in r] == [10, 20, 24]
    assert records[-1]["heldout_loss"] < records[9]["heldout_loss"]


def test_expert_load_counts_every_assignment(whole):
    for record in read_metrics(whole)[:3]:
        backbone, mtp = record["expert_load"]
        assert sum(backbone) == 2 * record["tokens"]  # two experts per token
        assert 0 < sum(mtp) < sum(backbone)  # no document's last token has a later one


def test_the_saved_config_reloads_to_an_equal_one(recipe, whole):
    assert load([whole / "config.gin"])[0] == load([recipe])[0]


def test_killed_and_resumed_equals_uninterrupted(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "orogen.cli", "train", "--gin_file", str(recipe), "--run", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment())
    wait_for(lambda: (folder / "checkpoints" / "8").is_dir(), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(recipe, folder, resume=True)
    assert curve(folder) == curve(whole)


def test_sigterm_saves_and_leaves_with_status_zero(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "orogen.cli",
        "train",
        "--gin_file",
        str(recipe),
        "--run",
        str(folder),
        "--gin_bindings",
        "TrainConfig.steps=100000",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: (folder / "metrics.jsonl").is_file() and len(complete_lines(folder)) >= 2, process)
    process.terminate()
    answer, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "--resume continues" in answer
    done = read_metrics(folder)[-1]["step"]
    assert (folder / "checkpoints" / str(done)).is_dir()


def test_a_run_goes_on_after_a_stop_on_another_mesh(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    run(recipe, folder, "TrainConfig.steps=8")
    run(recipe, folder, "PlanConfig.data=2", "PlanConfig.expert=2", resume=True)
    # Sums in another order, through sixteen updates of Adam.
    for ours, theirs in zip(curve(folder), curve(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


def test_a_run_goes_on_on_stages_and_off_them(recipe, tmp_path):
    """Parameters and moments (Muon's and, for vectors, AdamW's) change their layout; `generate` also reads a pipeline's
    checkpoint as a whole model."""
    layers = ("ModelConfig.pattern='M-*/E'", "ModelConfig.intermediate_size=24")
    model = ("OptimizerConfig.name='muon'", *layers, "TrainConfig.evaluate_every=16")
    alone, folder = tmp_path / "alone", tmp_path / "run"
    run(recipe, alone, "TrainConfig.steps=16", *model)
    stages = ("PlanConfig.stage=2", "PlanConfig.microbatches=2", *model)
    run(recipe, folder, "TrainConfig.steps=4", *stages)
    piped = open_model(folder)
    run(recipe, folder, "TrainConfig.steps=8", "PlanConfig.data=2", *model, resume=True)
    more = ("PlanConfig.schedule='interleaved'", "TrainConfig.steps=12")
    run(recipe, folder, *stages, *more, resume=True)
    run(recipe, folder, "TrainConfig.steps=16", *model, resume=True)
    for ours, theirs in zip(curve(folder), curve(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        np.testing.assert_allclose(ours["expert_load"], theirs["expert_load"], atol=3)
    assert ours["heldout_loss"] == pytest.approx(theirs["heldout_loss"], rel=2e-3)
    whole = open_model(alone)
    assert jax.tree.structure(piped.params) == jax.tree.structure(whole.params)


def test_another_config_is_refused_and_nothing_changes(recipe, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(ConfigError, match=r"OptimizerConfig\.learning_rate is 0\.003 there and 0\.5 here"):
        run(recipe, whole, "OptimizerConfig.learning_rate=0.5", resume=True)
    with pytest.raises(ConfigError, match="holds a run; expected --resume"):
        run(recipe, whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_too_many_steps_that_are_not_finite_stop_the_run(recipe, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 4: 3 steps in a row .* expected fewer than .* = 3"):
        run(
            recipe,
            tmp_path / "run",
            "OptimizerConfig.learning_rate=1e38",
            "OptimizerConfig.clip_norm=1e38",
            "TrainConfig.max_skipped_steps=3",
        )
    assert read_metrics(tmp_path / "run")[-1]["skipped_steps"] == 3


def test_a_row_of_steps_that_are_not_finite_is_one_line(recipe, tmp_path, caplog):
    wild = ("OptimizerConfig.learning_rate=1e38", "OptimizerConfig.clip_norm=1e38", "TrainConfig.max_skipped_steps=4")
    lines: list[str] = []
    with pytest.raises(NonFiniteError):
        train(*load([recipe], wild), tmp_path / "run", PRETRAINING, log=lines.append)
    assert len(lines) == 1 and lines[0].startswith("step 2 was skipped and changed nothing: the loss is ")
    assert not [record for record in caplog.records if "NaN" in record.getMessage()]  # TensorBoard's writer warns


def test_a_run_that_stops_before_its_last_evaluation_goes_on_to_it(recipe, whole, tmp_path, monkeypatch):
    """One that stops in an earlier evaluation repeats it when it is resumed."""
    from orogen.train.heldout import Heldout

    folder, tokenizer = tmp_path / "run", tmp_path / "run" / "tokenizer" / "tokenizer.json"
    for method, step in (("sample", 10), ("full", STEPS)):
        with monkeypatch.context() as patched:
            patched.setattr(Heldout, method, lambda *_: signal.raise_signal(signal.SIGTERM))
            if method == "sample":  # as an earlier release saved it: without a post-processor
                patched.setattr(Tokenizer, "as_in_training", lambda self: self)
            stopped = run(recipe, folder, resume=True)
        assert json.loads(tokenizer.read_text())["post_processor"] is None  # a checkpoint has its checksum
        assert (int(stopped.state.step), stopped.finished) == (step, False)
        assert "heldout_loss" not in read_metrics(folder)[-1]
    finished = run(recipe, folder, resume=True)
    assert (finished.finished, finished.steps) == (True, 0)
    assert curve(folder) == curve(whole)


def test_a_folder_in_use_is_refused_before_anything_is_read(recipe, whole):
    with RunLock(whole, log=print), pytest.raises(ConfigError, match=rf"is in use \(host .*pid {os.getpid()}"):
        run(recipe, whole, resume=True)


def test_steps_that_overflow_a_buffer_stop_the_run_and_say_what_to_do(recipe, tmp_path):
    plan = ("PlanConfig.data=2", "PlanConfig.expert=2", "PlanConfig.dispatch='ragged'", "PlanConfig.buffer_factor=0.25")
    with pytest.raises(NonFiniteError) as caught:
        run(recipe, tmp_path / "run", *plan, "TrainConfig.max_skipped_steps=2")
    records = read_metrics(tmp_path / "run")
    assert [record["skipped_steps"] for record in records] == [1, 2]
    lost = records[-1]["overflow_rows"]
    assert lost > 0
    assert str(caught.value) == (
        f"step 2: 2 steps in a row were skipped ({lost} assignments did not fit with PlanConfig.buffer_factor = 0.25; "
        "raise it); expected fewer than TrainConfig.max_skipped_steps = 2"
    )


def test_nothing_is_saved_while_steps_are_not_finite(recipe, tmp_path):
    """The second step is the first that is not finite."""
    wild = ("OptimizerConfig.learning_rate=1e38", "OptimizerConfig.clip_norm=1e38", "TrainConfig.checkpoint_every=1")
    with pytest.raises(NonFiniteError):
        run(recipe, tmp_path / "run", *wild, "TrainConfig.max_skipped_steps=3")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_step_times_add_up_to_the_time_that_the_steps_took(recipe, tmp_path, monkeypatch):
    """Even if a step's metrics are read long after it, and those of two steps right after each other."""
    from orogen.train import programs

    honest = programs.make_step

    def slow(*arguments, **named):
        step = honest(*arguments, **named)

        def call(*operands):
            result = jax.block_until_ready(step(*operands))
            time.sleep(0.1)
            return result

        return call

    monkeypatch.setattr(programs, "make_step", slow)
    run(recipe, tmp_path / "run", "TrainConfig.steps=9", "TrainConfig.evaluate_every=4")
    times = [record["step_ms"] for record in read_metrics(tmp_path / "run")]
    assert all(50 < seconds < 2000 for seconds in times[1:]), times


def environment() -> dict[str, str]:
    """The environment of a child process: one device, like the test process that it is compared with."""
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}


def complete_lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().split("\n")[:-1]


def wait_for(condition, process, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with status {process.returncode}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
