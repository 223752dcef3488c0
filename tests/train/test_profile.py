"""`orogen train --profile`: the trace of some steps, and its table in the run folder."""

import json
from pathlib import Path

import jax
import pytest
from tests.helpers import several_devices, write_recipe

from orogen.config.load import load
from orogen.train.pretraining import PRETRAINING
from orogen.train.profiled import StepProfile, Steps
from orogen.train.run import train


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture
def own_scopes():
    """Programs from the persistent cache have the scopes of the code that they were compiled from, unless these are
    part of the key."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


@several_devices
def test_a_traced_run(recipe, tmp_path, own_scopes):
    config, text = load([recipe], ["TrainConfig.steps = 5", "PlanConfig.data = 2", "PlanConfig.fsdp = 'optimizer'"])
    run, said = tmp_path / "run", []
    train(config, text, run, PRETRAINING, profile=Steps.of("3:4"), log=said.append)
    assert said[:2] == [f"steps 3 to 4 are traced in {run / 'profile'}", "2 steps; milliseconds per step"]
    table = json.loads((run / "profile" / "table.json").read_text())
    assert table["steps"] == 2 and sorted(table["devices"]) == ["CPU:0", "CPU:1"]
    for times in table["devices"].values():
        parts = times["compute_ms"] + times["exposed_ms"] + times["idle_ms"]
        assert parts == pytest.approx(times["step_ms"], abs=1e-3) and times["compute_ms"] > 0
    found = {(row["kind"], row["part"].split("/")[0], row["phase"]) for row in table["compute"]}
    for phase in ("forward", "backward"):
        assert {("Attention", "core", phase), ("MLP", "up", phase), ("cross_entropy", "", phase)} <= found
    assert ("optimizer", "", "forward") in found
    sent = {(row["operation"], row["kind"]) for row in table["communication"]}
    assert {("reduce-scatter", "reduce_gradients"), ("all-gather", "gather_parameters")} <= sent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:3", "--profile '4:3'; expected a step or a range of steps, such as 10:13"),
        ("0:3", "--profile '0:3'; expected a step or a range of steps, such as 10:13"),
        ("3-4", "--profile '3-4'; expected a step or a range of steps, such as 10:13"),
        ("1:2", "--profile 1:2; expected steps from 2, since the one before compiles, to 2, the last of the run"),
        ("2:3", "--profile 2:3; expected steps from 2, since the one before compiles, to 2, the last of the run"),
    ],
)
def test_other_steps_are_refused(recipe, tmp_path, refused, text, message):
    assert refused("train", "--gin_file", recipe, "--run", tmp_path / "run", "--profile", text) == message


def test_steps_that_a_resumed_run_has_passed_are_one_line_and_no_error(tmp_path):
    """A launcher starts it again with the command that began it."""
    said = []
    for text, done in (("7", 5), ("7:8", 6), ("7:8", 7), ("7:8", 9)):
        StepProfile(Steps.of(text), tmp_path, said.append).check(done, 9)
    assert said == [f"--profile 7:8: no trace, since the run is at step {done}" for done in (6, 7, 9)]
    with pytest.raises(ValueError, match="--profile 7:10; expected steps from 8, .* to 9"):
        StepProfile(Steps.of("7:10"), tmp_path, print).check(6, 9)
    passed = StepProfile(Steps.of("7"), tmp_path, said.append)
    passed.check(6, 9)
    passed.before(7, ())
    assert not (tmp_path / "profile").exists()


def test_a_stop_on_the_way_ends_the_trace(tmp_path):
    said = []
    with StepProfile(Steps(2, 9), tmp_path, said.append) as profile:
        profile.before(2, ())
        profile.after(2, ())
    with jax.profiler.trace(str(tmp_path / "next")):  # jax refuses a second trace while one runs
        pass
    assert said == [] and not (tmp_path / "profile" / "table.json").exists()


def test_a_trace_without_devices_is_one_line_and_no_error(tmp_path):
    said = []
    with StepProfile(Steps(2, 2), tmp_path, said.append) as profile:
        profile.before(2, ())
        profile.after(2, ())
    (line,) = said
    assert line.startswith("--profile: no table of steps 2 to 2: ") and line.endswith("events of devices")
