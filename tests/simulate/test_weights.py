"""The weights that the simulator lists are those of the model."""

import math

import pytest
from tests.helpers import hybrid

from orogen.model.count import count
from orogen.simulate.weights import layer_weights

BIASES = [
    {},
    {"mlp_bias": True},
    {"mlp_bias": True, "mlp_gated": True, "moe_latent_size": None},
    {"mlp_bias": True, "moe_bias": "shared"},
    {"mlp_bias": True, "moe_bias": "shared", "mlp_gated": True, "moe_latent_size": None},
    {"mlp_bias": True, "moe_bias": "shared", "moe_shared_expert_intermediate_size": None},
]


@pytest.mark.parametrize("changes", BIASES, ids=str)
def test_an_expert_layer_s_weights_are_the_model_s(changes):
    one, two = (hybrid(pattern=pattern, mtp_depths=0, **changes) for pattern in ("E", "EE"))
    layer = count(two)["total"] - count(one)["total"] - one.n_routed_experts * one.router_correction_bias
    assert sum(math.prod(weight.shape) for weight in layer_weights("E", one)) == layer
