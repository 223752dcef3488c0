"""The losses of pairs: sums over documents, numbers worked out in float64, and plans against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.preference import PreferenceConfig
from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.posttrain.documents import document_sums
from orogen.posttrain.preference import REFERENCE, preference
from orogen.train.step import batch_to_devices, gradients
from orogen.train.verify import verify

VOCABULARY = 7


def config(**fields) -> PreferenceConfig:
    return PreferenceConfig(template="nemotron_3_nano", **fields)


def pair_batches(run, count):
    """Rows of documents of uneven lengths, several per row; some rows end in padding or in a document without a pair.
    About half of each document's tokens are its answer."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        rows, length = run.train.batch_size, run.train.sequence_length
        batch = Batch(
            rng.integers(0, run.model.vocab_size, (rows, length), np.int32), *np.zeros((2, rows, length), np.int32),
            np.zeros((rows, length), np.float32), {REFERENCE: np.zeros((rows, length), np.float32)},
        )  # fmt: skip
        for row in range(rows):
            start, number = 0, 0
            while start < length - 2 and number < 2 + row:
                size = min(int(rng.integers(3, max(4, length // 3))), length - start)
                span, number = slice(start, start + size), number + 1
                batch.segments_bt[row, span] = number
                batch.positions_bt[row, span] = np.arange(size)
                batch.weights_bt[row, start + int(rng.integers(1, size)) : start + size] = 1
                uniform = -np.log(run.model.vocab_size) * batch.weights_bt[row, span].sum()
                batch.extras[REFERENCE][row, start] = uniform + rng.normal()
                start += size
        made.append(batch)
    return made


@several_devices
@pytest.mark.parametrize(
    ("model", "plan", "fields"),
    [
        ({"pattern": "M*", "mtp_depths": 0}, {"tensor": 2, "context": 2, "fsdp": "optimizer"},
         {"average_log_probs": True, "sft_weight": 0.5}),
        ({"pattern": "*E", "mtp_depths": 0}, {"data": 2, "expert": 2, "microbatches": 2, "fsdp": "parameters"},
         {"loss": "ipo", "sft_weight": 0.2, "sft_average_log_probs": True}),
        ({"pattern": "M|*E/E"}, {"stage": 2, "context": 2, "microbatches": 2, "shift": "alltoall"},
         {"label_smoothing": 0.1}),
        ({"pattern": "M*", "mtp_depths": 0, "score_head": True}, {"tensor": 2, "context": 2},
         {"loss": "bradley_terry", "center_weight": 0.01}),
        ({"pattern": "-|*", "mtp_depths": 0, "score_head": True},
         {"stage": 2, "data": 2, "microbatches": 2, "fsdp": "gradients"}, {"loss": "bradley_terry"}),
    ],
    ids=["tensor, context", "expert, data", "stages, context", "rewards", "rewards, stages"],
)  # fmt: skip
def test_a_loss_of_pairs_under_a_plan_equals_one_device(model, plan, fields):
    run = run_config(hybrid(**model), plan=plan, sequence_length=48)
    verdict = verify(run, objective=preference(config(**fields)), batches=pair_batches, optimizers=("adamw",))
    assert verdict.passed, verdict
    unused = ("mtp", "head") if fields.get("loss") == "bradley_terry" else ("mtp",)
    assert all(leaf.startswith(unused) for leaf in verdict.zero_leaves)
