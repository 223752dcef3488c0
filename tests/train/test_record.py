"""The record of a step, worked out by hand. Letters: b batch, t time."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config

from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.train.loop import Loop
from orogen.train.next_token import LOSS, MTP_LOSS, NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import StepMetrics, batch_to_devices, make_step
from orogen.train.task import Metric

SMALL = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
# Documents of 5, 2 and 3 tokens (the third has the number of the first) and one of 12; 2 tokens are padding.
SEGMENTS_BT = np.array([[1, 1, 1, 1, 1, 2, 2, 1, 1, 1, 0, 0], [7] * 12], np.int32)
LENGTHS = (5, 2, 3, 12)
PEAK, SECONDS = 1e6, 0.25


def batch(segments_bt: np.ndarray) -> Batch:
    zeros_bt = np.zeros(segments_bt.shape, np.int32)
    return Batch(zeros_bt, segments_bt, zeros_bt, zeros_bt.astype(np.float32))


def metrics(**changes) -> StepMetrics:
    usual = {name: np.asarray(0.0) for name in StepMetrics._fields}
    deeper = Metric(np.array([9.0, 8.0]), np.array([3.0, 2.0]))
    usual |= {"metrics": {LOSS: Metric(6.0, 4.0), MTP_LOSS: deeper}, "load_le": np.zeros((0, 0))}
    return StepMetrics(**(usual | {"tokens": np.asarray(22.0), "loss": np.asarray(5.5)} | changes))


def record(model: dict, plan: dict, segments_bt: np.ndarray = SEGMENTS_BT) -> dict:
    config = run_config(hybrid(**SMALL, **model), plan=plan)
    run: Any = SimpleNamespace(config=config, peak=PEAK)
    return Loop._record(run, 3, batch(segments_bt), metrics(), SECONDS)


def keys_seen(length: int, window: int) -> float:
    """The keys that all tokens of a document see; each counts itself by half."""
    return sum(min(place, window - 1) + 0.5 if place < window else window for place in range(length))


@pytest.mark.parametrize("plan", [{}, {"data": 2, "context": 2}], ids=str)
@pytest.mark.parametrize(("letter", "window"), [("*", 99), ("w", 3)])
def test_mfu_counts_what_documents_see_on_every_device(letter, window, plan):
    found = record({"pattern": letter, "mtp_depths": 0, "sliding_window": 3 if letter == "w" else None}, plan)
    # A multiply-add counts as two: query and out 8 x 12, key and value 8 x 6, head 8 x 11; then 12 numbers of a key and
    # of a value per key that a token sees. Three passes.
    per_token = 2 * (2 * 8 * 12 + 2 * 8 * 6 + 8 * 11)
    pairs = sum(keys_seen(length, window) for length in LENGTHS)
    operations = 3 * (22 * per_token + 4 * 12 * pairs)
    devices = math.prod(plan.values())
    assert found["mfu"] == pytest.approx(operations / SECONDS / devices / PEAK, rel=1e-9)


def test_mfu_counts_each_depth_of_prediction():
    found = record({"pattern": "-/-", "mtp_depths": 2, "intermediate_size": 5}, {})
    mlp, head, projection = 2 * 2 * 8 * 5, 2 * 8 * 11, 2 * 16 * 8
    operations = 3 * 22 * (mlp + head + 2 * (projection + mlp + head))
    assert found["mfu"] == pytest.approx(operations / SECONDS / PEAK, rel=1e-9)


def test_a_packed_row_is_worth_its_documents_apart():
    model = {"pattern": "*M-", "mtp_depths": 0}
    apart_bt = np.zeros((4, 12), np.int32)
    for row_t, length in zip(apart_bt, LENGTHS, strict=True):
        row_t[:length] = 1
    assert record(model, {})["mfu"] == pytest.approx(record(model, {}, apart_bt)["mfu"], rel=1e-12)


def test_losses_and_rates_by_hand():
    found = record({"pattern": "-/-", "mtp_depths": 2}, {"data": 2})
    assert found["loss"] == 1.5 and found["objective"] == 5.5
    assert found["mtp_loss"] == [3.0, 4.0]
    assert found["tokens_per_second"] == 88.0 and found["step_ms"] == 250.0 and found["step"] == 3


def test_a_device_without_a_known_peak_has_no_mfu():
    config = run_config(hybrid(**SMALL, pattern="-", mtp_depths=0))
    run: Any = SimpleNamespace(config=config, peak=None)
    assert "mfu" not in Loop._record(run, 3, batch(SEGMENTS_BT), metrics(), SECONDS)


def test_the_learning_rate_is_that_of_the_update_which_the_step_makes():
    """Warm-up takes 8 updates. After 7 batches, 2 of them skipped, the sixth update takes 6/8 of the peak."""
    config = run_config(hybrid(**SMALL, pattern="-", mtp_depths=0, intermediate_size=5))
    settings = {"learning_rate": 0.8, "schedule": "constant", "warmup_steps": 8, "weight_decay": 0.0}
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **settings))
    plan, built = make_plan(config.plan, config.model), build(config.model)
    optimizer = make_optimizer(config.optimizer, 10, built.params)
    state = create_state(config.model, built, optimizer, plan, 0)
    counters = {"step": 7, "skipped": 2, "skipped_in_row": 0}
    updates = jax.tree.map(lambda x: x + 5 if x.ndim == 0 else x, state.optimizer)  # five updates so far
    state = state._replace(**{n: np.asarray(v, np.int32) for n, v in counters.items()}, optimizer=updates)
    before = jax.device_get(state.params)
    step = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    after, found = step(state, batch_to_devices(packed_batch(config, config.train), plan))
    assert float(found.learning_rate) == pytest.approx(0.6, rel=1e-6)
    # Moments are zero, so AdamW's sixth update is (1 - 0.9) / (1 - 0.9^6) over the root of the same for 0.95.
    moved = np.abs(np.asarray(after.params["head"]["weight"][...]) - before["head"]["weight"][...]).max()
    ratio = (1 - 0.9) / (1 - 0.9**6) / np.sqrt((1 - 0.95) / (1 - 0.95**6))
    assert moved == pytest.approx(0.6 * ratio, rel=1e-2)
