"""config.json to ModelConfig and back: every generation of its fields, and a refusal for what we do not implement."""

import dataclasses
import json
import math

import pytest
from tests.convert.synthetic import CASES, shapes, stored

from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.convert.config import difference, family_of, read_config, write_config
from orogen.convert.names import table


def changed(case: str, **fields) -> dict:
    """A case's config.json with some fields replaced; None removes one."""
    values = shapes(case)[0] | fields
    return {name: value for name, value in values.items() if value is not None}


def read(case: str, **fields) -> ModelConfig:
    return read_config(changed(case, **fields))[1]


@pytest.mark.parametrize("case", CASES)
def test_table_names_what_transformers_writes(case):
    family, config = read_config(stored()[case]["config"])
    ours = {name: list(t.shape) for name, t in table(family, config).items() if t.copy_of is None}
    assert ours == stored()[case]["tensors"]


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case):
    values = stored()[case]["config"]
    family, config = read_config(values)
    assert family == values["model_type"] == family_of(config)
    assert write_config(family, config, values) == values
    assert read_config(write_config(family, config))[1] == config


@pytest.mark.parametrize("case", CASES)
def test_gin_text_loads_to_an_equal_config(case, tmp_path):
    config = read_config(stored()[case]["config"])[1]
    (tmp_path / "config.gin").write_text(model_text(config))
    assert load([tmp_path / "config.gin"])[0].model == config


def test_fields_that_no_shape_shows():
    """By hand, per case: the fields whose loss would change no shape."""
    facts = {case: dataclasses.asdict(read_config(stored()[case]["config"])[1]) for case in CASES}
    expected = {
        "nemotron_h": {"norm": "rms", "router_score": "sigmoid", "routed_scaling_factor": 2.5, "time_step_min": None},
        "nemotron_h_biased": {"time_step_min": 0.01, "time_step_max": 0.2, "mamba_proj_bias": True, "mlp_bias": True},
        "nemotron_h_mlp_bias": {"mlp_bias": True, "moe_bias": "shared", "moe_latent_size": 18},
        "mamba2": {"norm": "rms_cast_first", "mamba_norm_groups": None, "n_groups": 2, "time_step_max": None},
        "mamba": {"norm": "rms_cast_first", "mamba_intermediate_size": 64, "tie_word_embeddings": True},
        "deepseek_v3": {
            "pattern": "+-+E+E+E", "norm": "rms_cast_first", "layer_norm_epsilon": 1e-6, "mlp_gated": True,
            "mlp_hidden_act": "silu", "router_score": "sigmoid", "router_correction_bias": True,
            "rope_interleave": True,
            "rope_theta": 1e4, "yarn_factor": 4.0, "yarn_original_positions": 64, "yarn_mscale": 1.0,
            "yarn_mscale_all_dim": 1.0, "moe_shared_expert_intermediate_size": 28, "attention_bias": "all",
            "n_group": 4, "topk_group": 2,
        },
        "mixtral": {"router_score": "softmax_topk", "router_correction_bias": False, "rope_theta": 1e6, "head_dim": 12},
        "qwen2_moe": {
            "pattern": "*E*-*E*E", "router_score": "softmax", "norm_topk_prob": False, "moe_shared_expert_gate": True,
            "attention_bias": "qkv", "qk_norm": False, "head_dim": 8,
        },
        "qwen3_moe": {"pattern": "*-*E*-*E", "norm_topk_prob": True, "qk_norm": True, "attention_bias": "all"},
        "gpt_oss": {
            "pattern": "wE*EwE*E", "norm": "rms", "sliding_window": 7, "attention_sinks": True, "swiglu_limit": 7.0,
            "router_bias": True, "router_score": "softmax_topk", "mlp_bias": True, "rope_theta": 150000.0,
            "yarn_factor": 32.0, "yarn_truncate": False, "yarn_original_positions": 4096, "yarn_mscale": None,
        },
        "nemotron": {"norm": "layer_1p", "partial_rotary_factor": 0.5, "mlp_gated": False, "mlp_hidden_act": "relu2"},
        "gpt2": {
            "norm": "layer", "learned_positions": 64, "mlp_hidden_act": "gelu_tanh", "tie_word_embeddings": True,
            "attention_bias": "all", "rope_theta": None,
        },
    }  # fmt: skip
    for case, fields in expected.items():
        assert {name: facts[case][name] for name in fields} == fields, case


# Generations of nemotron_h

HUB = {"layers_block_type": None, "mtp_layers_block_type": None}


@pytest.mark.parametrize(
    "fields",
    [
        HUB | {"hybrid_override_pattern": "MEM*-EME", "num_hidden_layers": 8, "mtp_hybrid_override_pattern": "*E"},
        {"layers_block_type": "mamba moe mamba attention mlp moe mamba moe".split()},
        {"mtp_layers_block_type": ["attention", "moe"]},
        {"n_groups": None, "mamba_n_groups": 2, "conv_kernel": None, "mamba_d_conv": 3},
        {"head_dim": None, "attention_head_dim": 12, "layer_norm_epsilon": None, "norm_eps": 1e-5},
        {"chunk_size": None, "mamba_chunk_size": 16, "use_conv_bias": None, "mamba_conv_bias": True},
        {"time_step_limit": None, "mamba_dt_limit": [0.0, math.inf]},
        {"time_step_limit": [0, 1.797e308]},
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {"rope_theta": 10000, "partial_rotary_factor": 1.0, "sliding_window": 5, "residual_in_fp32": True},
    ],
    ids=lambda fields: next(name for name in fields if name not in HUB or len(fields) == 1),
)
def test_every_way_of_writing_nemotron_h_is_the_same_model(fields):
    assert read("nemotron_h", num_nextn_predict_layers=1, **fields) == read("nemotron_h", num_nextn_predict_layers=1)


def test_json_with_a_bare_infinity():
    text = json.dumps(changed("nemotron_h", time_step_limit=[0.001, math.inf]))
    config = read_config(json.loads(text))[1]
    assert (config.time_step_min, config.time_step_max) == (0.001, None)


def test_older_rotary_fields_are_the_same_model():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0}
    older = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": scaling | {"mscale_all_dim": 1.0}}
    assert read("deepseek_v3", **older) == read("deepseek_v3")
    assert read("nemotron", rope_parameters=None, rope_theta=10000.0) == read("nemotron")
    assert read("mixtral", rope_parameters=None).rope_theta == 1e6


def test_sliding_windows():
    assert read("mixtral", sliding_window=9).pattern == "wEwEwE"
    windowed = {"use_sliding_window": True, "sliding_window": 9, "layer_types": None}
    assert read("qwen2_moe", max_window_layers=2, **windowed).pattern == "wE*-*E*E"
    assert read("qwen3_moe", use_sliding_window=True, sliding_window=9).pattern == "w-wEw-wE"


REFUSED = [
    ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act is 'gelu'; expected 'silu'"),
    ("nemotron_h", {"mlp_hidden_act": "tanh"}, "mlp_hidden_act is 'tanh'; expected 'relu2' or"),
    ("nemotron_h", {"num_hidden_layers": 7}, "num_hidden_layers is 7; expected 8"),
    ("nemotron_h", {"layers_block_type": ["mamba", "rwkv"]}, "layers_block_type is 'rwkv'; expected some of mamba"),
    ("nemotron_h", {"hybrid_override_pattern": "MM"}, "hybrid_override_pattern is 'MM'; expected 'MEM*-EME'"),
    ("nemotron_h", {"mamba_n_groups": 4}, "mamba_n_groups is 4; expected 2, as n_groups is"),
    ("nemotron_h", {"time_step_limit": [0]}, "time_step_limit is [0]; expected two numbers"),
    ("nemotron_h", {"model_type": "llama"}, "model_type is 'llama'; expected one of nemotron_h, mamba2"),
    ("nemotron_h", {"model_type": ["llama"]}, "model_type is ['llama']; expected one of nemotron_h, mamba2"),
    ("mamba2", {"expand": 3}, "expand is 3; expected num_heads * head_dim / hidden_size"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'; expected 'noaux_tc'"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'; expected 'sigmoid'"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method is 'awq'"),
    (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8"}},
        "weight_block_size is None; expected two",
    ),
    ("mixtral", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'; expected 'default' or 'yarn'"),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
        "rope_parameters.attention_factor is 1.5; expected none",
    ),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5; expected 1.702"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "layer_types is 'chunked_attention'; expected 4 of"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; expected False"),
    ("gpt2", {"n_embd": "wide"}, "expected fields of the types that transformers writes"),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED)
def test_effects_that_we_do_not_implement_are_refused(case, fields, message):
    with pytest.raises(ConfigError) as error:
        read(case, **fields)
    assert str(error.value).startswith("config.json: ") and message in str(error.value)
    assert "\n" not in str(error.value)


# Writing


def test_what_changed_is_written_and_the_rest_is_kept():
    before = changed("nemotron_h", bos_token_id=17, rope_theta=123.0)
    config = dataclasses.replace(read_config(before)[1], pattern="ME", routed_scaling_factor=5.0)
    after = write_config("nemotron_h", config, before)
    assert (after["bos_token_id"], after["rope_theta"], after["routed_scaling_factor"]) == (17, 123.0, 5.0)
    assert after["hybrid_override_pattern"] == "ME" and "layers_block_type" not in after
    assert read_config(after)[1] == read_config(write_config("nemotron_h", config))[1]


def test_settings_of_training_make_no_difference():
    config = read("nemotron_h")
    trained = dataclasses.replace(config, router_z_loss_coef=0.5, pattern="MEM*|-EME")
    assert read_config(write_config("nemotron_h", trained))[1] == config
    assert difference(config, dataclasses.replace(config, norm="layer")) == "norm"
    # No layer of the model reads the window.
    assert difference(config, dataclasses.replace(config, sliding_window=8)) is None


def test_a_model_that_no_family_holds_is_refused():
    config = dataclasses.replace(read("nemotron_h"), router_bias=True)
    with pytest.raises(ConfigError, match=r"ModelConfig.router_bias is True; expected what .* nemotron_h can hold"):
        family_of(config)
    with pytest.raises(ConfigError, match="ModelConfig.pattern is 'MEM"):
        write_config("mixtral", dataclasses.replace(read("mixtral"), pattern="MEM*", **MAMBA))


MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 6}
