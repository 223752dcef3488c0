"""FLOPs of each layer, worked out by hand with small unequal numbers."""

from pathlib import Path

import pytest

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.cost.flops import forward_flops_per_token, peak_flops, training_flops_per_token

MODELS = Path(__file__).parents[2] / "gin_configs" / "models"
D, V, T = 5, 11, 12
HEAD = 2 * D * V  # 110
ATTENTION = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 3}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 3, "n_groups": 2, "ssm_state_size": 7, "conv_kernel": 4}
EXPERTS = {"n_routed_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 13}


def layers(pattern: str, length: int = T, **sizes) -> float:
    """Operations of one token, without the head."""
    return forward_flops_per_token(ModelConfig(pattern=pattern, vocab_size=V, hidden_size=D, **sizes), length) - HEAD


def test_mlp():
    # up and down, no gate: 2 · (5·8 + 8·5)
    assert layers("-", intermediate_size=8) == 160


def test_a_gated_mlp_has_three_matrices():
    assert layers("-", intermediate_size=8, mlp_gated=True, mlp_bias=True) == 240


def test_attention():
    # projections: query 5x18, key and value 5x6 each, out 18x5, twice their 240 entries: 480
    # scores and values over half of 12 tokens: 2 · 18 · 6 each: 432
    assert layers("*", **ATTENTION) == 480 + 432


def test_attention_grows_with_the_sequence_and_projections_do_not():
    assert layers("*", length=2 * T, **ATTENTION) == 480 + 2 * 432


def test_a_window_bounds_the_keys_seen():
    # projections 480; queries of 4 tokens see 0.5, 1.5, 2.5 and 3.5 keys, the other 8 see 4 each: 40 of 12 tokens
    assert layers("w", **ATTENTION, sliding_window=4) == pytest.approx(480 + 4 * 18 * 40 / 12)
    assert layers("w", **ATTENTION, sliding_window=T) == layers("w", **ATTENTION, sliding_window=99) == 480 + 432


def test_latent_attention():
    sizes = {"num_attention_heads": 6, "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4}
    # latent 5x7, rotary key 5x2, keys 7x18, values 7x24, out 24x5: 459 entries; queries 5x30: 150
    # scores of 30 numbers and values of 24, over half of 12 tokens: 2 · 54 · 6
    assert layers("+", **sizes, rope_theta=10.0) == 2 * (459 + 150) + 648
    # queries through 5x8 and 8x30: 280
    assert layers("+", **sizes, rope_theta=10.0, q_lora_rank=8) == 2 * (459 + 280) + 648


def test_experts_count_the_active_ones():
    # router 5x9: 90; two experts of up 5x13 and down 13x5: 2 · 2 · 130 = 520
    assert layers("E", **EXPERTS) == 90 + 520


def test_shared_expert_and_latent():
    # router 90; latent 5x3 down and 3x5 up: 60; two experts of 3x13 and 13x3: 312; shared 5x17 and 17x5: 340
    assert layers("E", **EXPERTS, moe_latent_size=3, moe_shared_expert_intermediate_size=17) == 90 + 60 + 312 + 340


def test_gated_experts_and_a_gated_shared_expert():
    # router 90; two experts of three 5x13: 2 · 2 · 195 = 780; shared three 5x17: 510, and its gate 5x1: 10
    sizes = {"moe_shared_expert_intermediate_size": 17, "moe_shared_expert_gate": True, "mlp_gated": True}
    assert layers("E", **EXPERTS, **sizes) == 90 + 780 + 510 + 10


def test_mamba():
    # inner 4·3 = 12, states 2·7 = 14
    # into z 12, x 12, B 14, C 14, dt 4 = 56 columns of 5, and out 12x5: 2 · (280 + 60) = 680
    # convolution over x, B, C: 2 · 4 · (12 + 14 + 14) = 320
    # in a chunk of 8, half of it: C·B 2 · 14 · 4 = 112, times x 2 · 12 · 4 = 96
    # state, in and out: 2 · 2 · 12 · 7 = 336
    assert layers("M", **MAMBA, chunk_size=8) == 680 + 320 + 112 + 96 + 336


def test_mamba1():
    # inner 9, rank 2, state 7; into x and z 5x9 each, out 9x5: 2 · 135 = 270
    # into dt, B, C 9x(2 + 7 + 7) = 144, dt's rank 2x9 = 18: 2 · 162 = 324; convolution 2 · 4 · 9 = 72
    # each of 9 · 7 elements of the state: dt A, the decay, the input's product and its sum; a product and a sum out: 6
    sizes = {"mamba_intermediate_size": 9, "time_step_rank": 2, "ssm_state_size": 7, "conv_kernel": 4}
    assert layers("m", **sizes) == 270 + 324 + 72 + 378


def test_a_chunk_is_no_longer_than_the_sequence():
    assert layers("M", length=T, **MAMBA, chunk_size=128) == layers("M", length=T, **MAMBA, chunk_size=T)


def test_layers_add_up_whatever_the_segments():
    sizes = {**ATTENTION, "intermediate_size": 8}
    assert layers("*-|-", **sizes) == layers("*", **ATTENTION) + 2 * layers("-", intermediate_size=8)


@pytest.mark.parametrize("depths", [1, 3])
def test_each_mtp_depth_costs_its_layers_a_projection_and_a_head(depths):
    # the projection takes two vectors of 5 to one: 2 · 10 · 5 = 100
    extra = layers("-/-", intermediate_size=8, mtp_depths=depths) - layers("-", intermediate_size=8)
    assert extra == depths * (160 + 100 + HEAD)


def test_training_is_three_forward_passes():
    config = ModelConfig(pattern="-", vocab_size=V, hidden_size=D, intermediate_size=8)
    assert forward_flops_per_token(config, T) == 160 + HEAD
    assert training_flops_per_token(config, T) == 3 * (160 + HEAD)


def test_r1_as_counted_by_hand():
    # d 2048, sequences of 8192. Mamba-2, inner 64·64 = 4096, states 8·128 = 1024:
    #   into z 4096, x 4096, B 1024, C 1024, dt 64 = 10,304 columns: 2 · 2048 · 10,304 = 42,205,184
    #   out 2 · 4096 · 2048 = 16,777,216; convolution 2 · 4 · (4096 + 2 · 1024) = 49,152
    #   in a chunk of 128, half of it: 2 · (1024 + 4096) · 64 = 655,360; state in and out 4 · 4096 · 128 = 2,097,152
    mamba = 42_205_184 + 16_777_216 + 49_152 + 655_360 + 2_097_152
    # attention: query and out 2048x4096, key and value 2048x256: 2 · 2 · 2048 · 4352 = 35,651,584
    #   scores and values over half of 8192 tokens: 2 · 2 · 4096 · 4096 = 67,108,864
    attention = 35_651_584 + 67_108_864
    # experts: gate 2 · 2048 · 64 = 262,144; six of 2048x1024 twice: 6 · 4 · 2048 · 1024 = 50,331,648
    #   the shared one of 2048x2048 twice: 4 · 2048 · 2048 = 16,777,216
    experts = 262_144 + 50_331_648 + 16_777_216
    # the pattern has 11 M, 3 * and 10 E; the head is 2 · 2048 · 32,768 = 134,217,728
    by_hand = 11 * mamba + 3 * attention + 10 * experts + 134_217_728
    assert by_hand == 1_795_833_856
    r1 = load([MODELS / "r1.gin"])[0].model
    assert forward_flops_per_token(r1, 8192) == by_hand
    assert training_flops_per_token(r1, 8192) == 3 * by_hand


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_is_found_by_the_devices_name(kind, peak):
    assert peak_flops(kind) == peak
