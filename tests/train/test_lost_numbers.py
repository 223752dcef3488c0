"""What a run reports of its roundings, and its late change of recipe."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, write_recipe

from orogen.cli import main
from orogen.config.precision import PrecisionConfig
from orogen.cost.assemble import assemble
from orogen.train.formats import in_formats
from orogen.train.lost_numbers import described, make_measure
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices

DENSE = """
ModelConfig.pattern = '-'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 12
ModelConfig.intermediate_size = 20
PrecisionConfig.recipe = 'nvfp4'
PrecisionConfig.switch_step = 3
PrecisionConfig.health_every = 2
"""


def measured(precision, weight):
    """The record of one step of a model of one MLP, of which one token's loss counts `weight` times as much."""
    run = run_config(hybrid(pattern="-", mtp_depths=0), batch_size=2, sequence_length=16)
    run = dataclasses.replace(run, precision=precision)
    plan, built = assemble(run.model, run.plan, length=16)
    optimizer = make_optimizer(run.optimizer, run.train.steps, built.params)
    state = create_state(run.model, built, optimizer, plan, seed=0)
    batch = packed_batch(run, run.train)
    weights_bt = np.where(batch.weights_bt > 0, 1, 0).astype(np.float32)
    for row in weights_bt:
        row[np.argmax(row)] = weight
    batch = batch_to_devices(batch._replace(weights_bt=weights_bt), plan)
    measure = make_measure(built, NEXT_TOKENS, run, in_formats(plan, run.precision, run.model), plan)
    return described(jax.device_get(measure(state, batch)))


def test_gradients_that_die_are_seen():
    """Beside one token's gradient the others' are below what 8 bits with one scale can hold: they become 0, and with
    them the gradients of hidden units that are idle for that token."""
    well = measured(PrecisionConfig(recipe="fp8_tensorwise"), 1.0)
    assert well["most_flushed"] < 0.05 and well["least_cosine"] > 0.98
    assert well["gradient_zeros"] == pytest.approx(well["plain_gradient_zeros"], abs=0.02)
    ill = measured(PrecisionConfig(recipe="fp8_tensorwise"), 1e11)
    assert ill["rounding_flushed"]["dense_down.input_gradient.dy"]["0"] > 0.5
    assert ill["rounding_flushed"]["dense_down.forward.x"] == well["rounding_flushed"]["dense_down.forward.x"]
    assert ill["gradient_zeros"][0] > ill["plain_gradient_zeros"][0] + 0.2


def test_a_run_changes_its_recipe_and_reports_what_rounding_lost(tmp_path, capsys):
    file = write_recipe(tmp_path)
    lines = [line for line in file.read_text().splitlines() if not line.startswith("ModelConfig.")]
    file.write_text(DENSE + "\n".join(lines).replace("TrainConfig.steps = 2", "TrainConfig.steps = 4"))
    assert main(["train", "--gin_file", str(file), "--run", str(tmp_path / "run")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # From step 3 on the layer is in the compute dtype.
    assert [("rounding_flushed" in record) for record in records] == [False, True, False, False]
    flushed = records[1]["rounding_flushed"]
    assert set(flushed) == {
        f"dense_{side}.{operand}" for side in ("up", "down")
        for operand in ("forward.x", "forward.w", "input_gradient.dy", "input_gradient.w", "weight_gradient.x",
                        "weight_gradient.dy")
    }  # fmt: skip
    assert all(set(layers) == {"0"} for layers in flushed.values())
    assert records[1]["gradient_cosine"] == [records[1]["least_cosine"]] and 0.5 < records[1]["least_cosine"] < 1
    # The step, what measures it, and the step after the change; step 4 has nothing to measure.
    assert ["compile_seconds" in record for record in records] == [True, True, True, False]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Rounding at step 2" in page and "dense_down.weight_gradient.dy" in page
    capsys.readouterr()
