"""Parameter counts: by hand, and of published models that have no other kind of layer."""

import pytest

from orogen.config.model import ModelConfig
from orogen.model.count import count

D, V = 5, 11
EXPERTS = {"n_routed_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 13}


def of(pattern: str, **sizes) -> dict[str, int]:
    return count(ModelConfig(pattern=pattern, vocab_size=V, hidden_size=D, **sizes))


def test_gated_mlp_with_biases_and_layer_norms_by_hand():
    # three 5x8 matrices, biases of 8, 8 and 5; two norms of weight and bias; embedding and head
    found = of("-", intermediate_size=8, mlp_gated=True, mlp_bias=True, norm="layer")
    assert found["total"] == found["active"] == 120 + 21 + 20 + 110


def test_experts_by_hand():
    # an expert has three 5x13 matrices and biases of 13, 13 and 5: 226; router 5x9 with a bias of 9; shared expert
    # three 5x17 without biases, and its gate of 5; two norms of 5; embedding and head 110
    found = of(
        "E", **EXPERTS, mlp_gated=True, mlp_bias=True, router_bias=True, router_correction_bias=False,
        moe_shared_expert_intermediate_size=17, moe_shared_expert_gate=True,
    )  # fmt: skip
    rest = 45 + 9 + 255 + 5 + 10 + 110
    assert found["total"] == 9 * 226 + rest
    assert found["active"] == 2 * 226 + rest
    assert found["active_without_embedding"] == found["active"] - 55


def test_biases_around_the_experts_by_hand():
    # an expert has two 4x13 matrices without biases; latent projections of 5x4 with biases of 4 and 5; shared expert of
    # two 5x17 with biases of 17 and 5; router 5x9 and its correction of 9; two norms of 5; embedding and head 110
    found = of(
        "E", **EXPERTS, mlp_bias=True, moe_bias="shared", moe_latent_size=4, moe_shared_expert_intermediate_size=17
    )
    rest = 40 + 9 + 170 + 22 + 45 + 9 + 10 + 110
    assert found["total"] == 9 * 104 + rest
    assert found["active"] == 2 * 104 + rest


def test_a_correction_bias_counts():
    assert of("E", **EXPERTS)["total"] - of("E", **EXPERTS, router_correction_bias=False)["total"] == 9


def test_a_tied_embedding_counts_once_and_always_as_active():
    tied = of("-", intermediate_size=8, tie_word_embeddings=True, learned_positions=7)
    assert tied["total"] == tied["active"] == tied["active_without_embedding"] == 80 + 10 + 55 + 35


NEMOTRON_4: dict = {
    "vocab_size": 256000, "hidden_size": 6144, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "norm": "layer_1p", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
}  # fmt: skip
SWIGLU: dict = {"mlp_gated": True, "mlp_hidden_act": "silu", "router_correction_bias": False}


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        pytest.param(
            {**NEMOTRON_4, "pattern": "*-" * 32, "intermediate_size": 24576},
            15_628_775_424, 15_628_775_424, id="Nemotron-4 15B",
        ),
        pytest.param(
            {
                **NEMOTRON_4, "pattern": "*E" * 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
                "moe_intermediate_size": 24576, "router_score": "softmax", "router_correction_bias": False,
            },
            83_276_083_200, 25_294_024_704, id="upcycled E8T2",
        ),
        pytest.param(
            {
                **SWIGLU, "pattern": "*E" * 56, "vocab_size": 32768, "hidden_size": 6144, "num_attention_heads": 48,
                "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
                "moe_intermediate_size": 16384, "router_score": "softmax_topk", "norm": "rms_cast_first",
            },
            140_630_071_296, 39_161_468_928, id="Mixtral 8x22B",
        ),
    ],
)  # fmt: skip
def test_published_models(model, total, active):
    found = count(ModelConfig(**model))
    assert (found["total"], found["active"]) == (total, active)
