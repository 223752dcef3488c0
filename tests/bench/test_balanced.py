"""Balanced routing, in whole steps on eight simulated devices."""

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config

from orogen.bench.balanced import balanced_choices
from orogen.bench.cpu_train import random_batch
from orogen.config.checks import ConfigError
from orogen.cost.assemble import assemble
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step

# 24 experts and 3 per token: 8 tokens choose each once.
FOLDED = {"data": 2, "context": 2, "tensor": 2, "expert": 8, "dispatch": "alltoall", "capacity_factor": 1.0}
STAGES = {"stage": 2, "data": 2, "expert": 2, "dispatch": "alltoall", "capacity_factor": 1.0, "microbatches": 2}


@pytest.mark.parametrize("sizes", [FOLDED, STAGES], ids=["folded", "stages"])
def test_every_expert_has_the_same_load_and_an_exact_capacity_drops_nothing(sizes):
    model = hybrid(pattern="EEE/E", mtp_depths=1)
    run = run_config(model, plan=sizes, batch_size=4, sequence_length=32).check()
    plan, built = assemble(model, run.plan, length=32)
    optimizer = make_optimizer(run.optimizer, run.train.steps, built.params)
    state = create_state(model, built, optimizer, plan, 0)
    batch = batch_to_devices(random_batch(model.vocab_size, 4, 32), plan)
    step = make_step(built, NEXT_TOKENS, run, plan, optimizer, replaying=True)
    metrics = jax.device_get(step(state, batch, None, balanced_choices(built, plan, run))[1])
    load_le = np.full((4, 24), 4 * 32 * 3 / 24)
    load_le[3, 21:] -= 4  # the MTP block leaves out the last token of each row
    np.testing.assert_array_equal(metrics.load_le, load_le)
    assert metrics.dropped == 0
    assert np.isfinite(metrics.loss)


def test_a_rank_with_an_uneven_part_is_refused():
    run = run_config(plan={"data": 2, "tensor": 2}, batch_size=4, sequence_length=24)
    plan, built = assemble(run.model, run.plan, length=24)
    with pytest.raises(ConfigError, match=r"sequence_length is 24; expected.*a multiple of 8 tokens"):
        balanced_choices(built, plan, run)
