"""Matrix products of a plan against those of one device, worked out by hand."""

import pytest
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.simulate.aot import flops_overhead

D = 48
MLP = hybrid(pattern="-", mtp_depths=0)


def test_dividing_work_costs_nothing():
    """Sequences over data; hidden columns and the vocabulary over tensor."""
    assert flops_overhead(MLP, PlanConfig(data=2, tensor=4), 4, 40) == 0


def test_what_every_tensor_rank_computes_is_overhead():
    """Two key heads on four ranks: each key and value is computed twice, in the forward product and both gradients."""
    model = hybrid(pattern="*", mtp_depths=0)
    tokens, keys = 4 * 40, 2 * 4
    once = 3 * 2 * 2 * tokens * D * keys
    queries = 3 * 2 * 2 * tokens * D * 24 * 4
    scores = 3 * 2 * 2 * 4 * 40 * 40 * 24 * 4
    softmax = 2 * 4 * 40 * 40 * 24  # its gradient's sum over keys, a product with each row's probabilities
    head = 3 * 2 * tokens * D * 96
    expected = once / (once + queries + scores + softmax + head)
    assert flops_overhead(model, PlanConfig(tensor=4), 4, 40) == pytest.approx(expected, rel=1e-12)
