"""Every illegal setting is refused by a ConfigError that names the field, its value and what was expected."""

import dataclasses

import pytest
from tests.helpers import HYBRID

from orogen.config.chat import ChatConfig
from orogen.config.checks import ConfigError, check_types
from orogen.config.cluster import ClusterConfig
from orogen.config.data import DataConfig, SourceConfig
from orogen.config.distill import DistillConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.model import ModelConfig
from orogen.config.phases import PhaseConfig
from orogen.config.plan import PlanConfig
from orogen.config.precision import GROUPS, KINDS, PrecisionConfig
from orogen.config.preference import PreferenceConfig
from orogen.config.quantize import QuantizeConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.config.run import OptimizerConfig, TrainConfig
from orogen.config.search import SearchConfig
from orogen.config.sweep import SweepConfig
from orogen.config.upcycle import UpcycleConfig
from orogen.config.vision import VisionConfig

GOOD = {
    ModelConfig: HYBRID,
    PlanConfig: {},
    TrainConfig: {"steps": 5, "batch_size": 12, "sequence_length": 20, "seed": 0},
    OptimizerConfig: {"learning_rate": 1e-3},
    DataConfig: {"corpus": "stdlib", "tokenizer": "byte"},
    ChatConfig: {"template": "nemotron_3_nano"},
    PreferenceConfig: {"template": "nemotron_3_nano"},
    SourceConfig: {"name": "web", "corpus": "stdlib", "weight": 0.5},
    PhaseConfig: {"after": 3},
    ClusterConfig: {},
    EvaluateConfig: {"tasks": ("mqar",)},
    SweepConfig: {"matrix": {"rate": {"low": [], "high": ["OptimizerConfig.learning_rate=1"]}}, "control": ("low",),
                  "seeds": (0, 1)},
    UpcycleConfig: {"expansion": 4, "top_k": 2},
    PrecisionConfig: {},
    DistillConfig: {"divergence": 1.0},
    SearchConfig: {},
    QuantizeConfig: {"format": "auto"},
    EnvironmentConfig: {"name": "desk", "kind": "workplace"},
    RLConfig: {"environments": (EnvironmentConfig(name="desk", kind="workplace"),), "prompts": 2, "samples": 2,
               "max_tokens": 4, "template": "plain"},
    VisionConfig: {"encoder": "clip", "features": "kept", "images_per_row": 3},
}  # fmt: skip

# (class, field, bad value, words of what was expected)
POSITIVE = {
    ModelConfig: "vocab_size hidden_size layer_norm_epsilon num_attention_heads num_key_value_heads head_dim "
    "intermediate_size mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel chunk_size n_routed_experts "
    "num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size n_group topk_group "
    "routed_scaling_factor",
    PlanConfig: "data context tensor stage expert expert_tensor microbatches capacity_factor",
    TrainConfig: "steps batch_size sequence_length evaluate_every evaluate_rows checkpoint_every keep_checkpoints "
    "max_skipped_steps max_roll_backs sample_tokens",
    OptimizerConfig: "learning_rate epsilon clip_norm",
    EvaluateConfig: "every samples limit stride batch_tokens",
    PrecisionConfig: "switch_step block expert_tokens",
    QuantizeConfig: "calibration_tokens heldout_tokens batch_size effective_bits score_tokens",
}
NOT_NEGATIVE = {
    ModelConfig: "router_aux_loss_coef router_z_loss_coef mtp_loss_scale",
    TrainConfig: "router_bias_update_rate checkpoint_minutes spike_deviations roll_back_after hang_minutes",
    OptimizerConfig: "warmup_steps decay_steps weight_decay",
    PrecisionConfig: "first_layers last_layers hadamard health_every",
    QuantizeConfig: "first_layers last_layers",
}
REFUSED = [
    *((c, field, bad, "a number above 0") for c, f in POSITIVE.items() for field in f.split() for bad in (0, -3)),
    *((c, field, -1, "0 or more") for c, fields in NOT_NEGATIVE.items() for field in fields.split()),
    (TrainConfig, "router_bias_update_rate", float("inf"), "0 or more"),
    (QuantizeConfig, "format", "int4", "one of fp8, fp8_channel, nvfp4, auto"),
    (QuantizeConfig, "scales", "awq", "one of max, mse, four_over_six"),
    (QuantizeConfig, "inputs", "dynamic", "one of static, none"),
    (QuantizeConfig, "cost", "latency", "one of weights, active"),
    (QuantizeConfig, "sequence_length", 1, "at least 2, a token and its target"),
    (QuantizeConfig, "keep", ("head:fp8",), "no head: it stays as it is"),
    (
        QuantizeConfig,
        "keep",
        ("experts:fp8",),
        f"entries KIND:FORMAT whose kind is one of {', '.join((*GROUPS, *KINDS))}",
    ),
    (QuantizeConfig, "keep", ("mamba:int8",), "formats that are some of plain, fp8, fp8_channel, nvfp4"),
    (
        QuantizeConfig,
        "keep",
        ("routed_up:fp8",),
        "routed in place of routed_up: all matrices of a layer's experts have one format",
    ),
    (QuantizeConfig, "candidates", ("fp8", "fp8"), "different ones of plain, fp8, fp8_channel, nvfp4"),
    (OptimizerConfig, "weight_decay", float("inf"), "0 or more"),
    (ModelConfig, "num_key_value_heads", 5, "a divisor of num_attention_heads = 24"),
    (ModelConfig, "n_groups", 7, "a divisor of mamba_num_heads = 24"),
    (ModelConfig, "mamba_norm_groups", 7, "a divisor of mamba_num_heads = 24"),
    (ModelConfig, "time_step_min", -0.1, "0 or more"),
    (ModelConfig, "n_group", 5, "a divisor of n_routed_experts = 24"),
    (ModelConfig, "topk_group", 2, "at most n_group = 1"),
    (ModelConfig, "num_experts_per_tok", 25, "at most 24, the experts in topk_group groups"),
    (ModelConfig, "yarn_factor", 4.0, "None: rope_theta is None"),
    (PlanConfig, "schedule", "2f2b", "one of gpipe, 1f1b, eager_1f1b, interleaved"),
    (PlanConfig, "virtual", 0, "a number above 0"),
    (PlanConfig, "fsdp", "full", "one of none, optimizer, gradients, parameters"),
    (PlanConfig, "dispatch", "ring", "one of allgather, alltoall, ragged"),
    (PlanConfig, "buffer_factor", 1.5, "None where dispatch is not ragged"),
    (PlanConfig, "drop_policy", "random", "one of position, probs"),
    (PlanConfig, "context_attention", "zigzag", "one of ring, allgather, alltoall"),
    (PlanConfig, "context_ssm", "ring", "one of state, heads"),
    (PlanConfig, "shift", "ring", "one of permute, alltoall"),
    (PlanConfig, "attention", "flash", "one of full, blocked, cudnn"),
    (PlanConfig, "ssd", "scan", "one of recurrence, chunked, triton"),
    (PlanConfig, "selective_scan", "recurrence", "one of reference, chunked"),
    (
        PlanConfig,
        "grouped_matmul",
        "triton",
        "one of reference, blocks, small_blocks, ragged_dot, mosaic, triton_small",
    ),
    (PlanConfig, "cross_entropy", "fused", "one of full, chunked"),
    (PlanConfig, "causal_conv1d", "fft", "one of taps, triton"),
    (PlanConfig, "rms_norm", "fused", "one of plain, triton"),
    (PlanConfig, "permutation", "sort", "one of gather, triton"),
    (PlanConfig, "quantize", "fused", "one of plain, triton"),
    (TrainConfig, "sequence_length", 1, "at least 2: a token and its target"),
    (TrainConfig, "seed", -1, "an integer from 0 to 2**31 - 1"),
    (TrainConfig, "seed", 2**31, "an integer from 0 to 2**31 - 1"),
    (TrainConfig, "ngram_order", 8, "a number from 0 to 7"),
    (TrainConfig, "loggers", ("tensorboard", "comet"), "some of tensorboard, wandb, trackio, each once"),
    (TrainConfig, "loggers", ("wandb", "wandb"), "some of tensorboard, wandb, trackio, each once"),
    (TrainConfig, "ngram_order", -1, "a number from 0 to 7"),
    (TrainConfig, "sample_prompts", (), "at least one, which may be empty"),
    (TrainConfig, "sample_prompts", ("a", "b\ud800"), "valid Unicode, without lone surrogates"),
    (TrainConfig, "compute_dtype", "float16", "one of float32, bfloat16"),
    (OptimizerConfig, "name", "sgd", "one of adamw, muon"),
    (OptimizerConfig, "schedule", "linear", "one of cosine, wsd, constant"),
    (OptimizerConfig, "min_ratio", 1.5, "a number from 0 to 1"),
    (OptimizerConfig, "beta1", -0.1, "a number from 0 to below 1"),
    (OptimizerConfig, "beta1", 1.0, "a number from 0 to below 1"),
    (OptimizerConfig, "beta2", 1.0, "a number from 0 to below 1"),
    (EvaluateConfig, "tasks", (), "at least one, or EvaluateConfig.texts"),
    (EvaluateConfig, "tasks", ("mqar", "mqar"), "each once"),
    (EvaluateConfig, "texts", ("",), "names that are not empty"),
    (EvaluateConfig, "lengths", (), "at least one length of 2 tokens or more"),
    (EvaluateConfig, "lengths", (64, 1), "at least one length of 2 tokens or more"),
    (EvaluateConfig, "method", "strided", "one of windows, carried"),
    (EvaluateConfig, "max_length", 1, "at least 2: a token and its target"),
    (EvaluateConfig, "shots", -1, "0 or more"),
    (EvaluateConfig, "seed", 2**32, "an integer from 0 to 2**32 - 1"),
]

WRONG_TYPE = [
    (ModelConfig, "hidden_size", "48", "int"),
    (ModelConfig, "hidden_size", 48.0, "int"),
    (ModelConfig, "hidden_size", True, "int"),
    (ModelConfig, "hidden_size", None, "int"),
    (ModelConfig, "head_dim", "4", "int"),
    (ModelConfig, "head_dim", True, "int"),
    (ModelConfig, "pattern", 7, "str"),
    (ModelConfig, "norm_topk_prob", 1, "bool"),
    (ModelConfig, "layer_norm_epsilon", "1e-5", "float"),
    (PlanConfig, "capacity_factor", False, "float | None"),
    (PlanConfig, "capacity_factor", "1.5", "float | None"),
    (TrainConfig, "sample_prompts", "one", "tuple[str, ...]"),
    (TrainConfig, "sample_prompts", ("one", 2), "tuple[str, ...]"),
    (OptimizerConfig, "learning_rate", "1e-3", "float"),
    (OptimizerConfig, "learning_rate", True, "float"),
    (DataConfig, "vocab_size", 259.0, "int | None"),
    (DataConfig, "shuffle", "False", "bool"),
]


def refusal(kind: type, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        kind(**{**GOOD[kind], **changes})
    return str(caught.value)


@pytest.mark.parametrize("kind", GOOD)
def test_the_settings_that_bad_ones_are_derived_from_are_accepted(kind):
    kind(**GOOD[kind])


@pytest.mark.parametrize(("kind", "field", "value", "expected"), REFUSED)
def test_refusal_names_field_value_and_expectation(kind, field, value, expected):
    assert refusal(kind, **{field: value}) == f"{kind.__name__}.{field} is {value!r}; expected {expected}"


@pytest.mark.parametrize(("kind", "field", "value", "expected"), WRONG_TYPE)
def test_wrong_type_is_refused_by_name(kind, field, value, expected):
    message = f"{kind.__name__}.{field} is {value!r}; expected a value of type {expected}"
    assert refusal(kind, **{field: value}) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_rate_that_is_not_finite_is_refused(value):
    message = f"OptimizerConfig.learning_rate is {value!r}; expected a number above 0"
    assert refusal(OptimizerConfig, learning_rate=value) == message


@pytest.mark.parametrize("field", ["weight_decay", "min_ratio", "beta1"])
def test_nan_is_in_no_range(field):
    assert refusal(OptimizerConfig, **{field: float("nan")}).startswith(f"OptimizerConfig.{field} is nan; expected ")


def test_int_passes_for_float():
    assert OptimizerConfig(learning_rate=1).learning_rate == 1


def test_a_list_becomes_a_tuple():
    assert TrainConfig(**GOOD[TrainConfig], sample_prompts=["a", "b"]).sample_prompts == ("a", "b")


def test_configs_are_frozen_and_keyword_only():
    for kind, good in GOOD.items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(**good), next(iter(dataclasses.fields(kind))).name, 1)
        with pytest.raises(TypeError):
            kind(*good.values(), 1)


def test_the_type_check_reaches_every_field():
    """An object of a foreign type is refused in every field."""
    for kind, good in GOOD.items():
        for field in dataclasses.fields(kind):
            config = kind(**good)
            object.__setattr__(config, field.name, object())
            with pytest.raises(ConfigError, match=rf"{kind.__name__}\.{field.name} is <object"):
                check_types(config)


LETTERS = {
    "*": ("attention", ("num_attention_heads", "num_key_value_heads", "head_dim")),
    "w": (
        "sliding-window attention",
        ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    ),
    "+": (
        "multi-head latent attention",
        ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_theta"),
    ),
    "-": ("dense MLP", ("intermediate_size",)),
    "M": ("Mamba-2", ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")),
    "E": ("mixture of experts", ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")),
}
# Sizes of layers that the small hybrid does not have.
LATENT = {"kv_lora_rank": 9, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 3, "rope_theta": 1e4}
SIZES = {**HYBRID, **LATENT, "sliding_window": 7}
NEEDED = [(letter, layer, field) for letter, (layer, fields) in LETTERS.items() for field in fields]


@pytest.mark.parametrize(("letter", "layer", "field"), NEEDED)
def test_a_layer_needs_its_sizes_and_no_other(letter, layer, field):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", *LETTERS[letter][1])}
    ModelConfig(pattern=letter, **sizes)
    with pytest.raises(ConfigError) as caught:
        ModelConfig(pattern=letter, **{**sizes, field: None})
    assert str(caught.value) == f"ModelConfig.{field} is None; expected a number: the pattern has {layer} layers"


def test_a_layer_after_the_slash_needs_its_sizes_too():
    with pytest.raises(ConfigError, match=r"head_dim is None; expected a number: the pattern has attention layers"):
        ModelConfig(**{**HYBRID, "pattern": "M/*", "head_dim": None, "mtp_depths": 1})


@pytest.mark.parametrize(
    ("letter", "field", "value", "expected"),
    [
        ("*", "partial_rotary_factor", 0.3, "above 0 and up to 1, so that it leaves an even number of head_dim = 4"),
        ("*", "partial_rotary_factor", 1.5, "above 0 and up to 1, so that it leaves an even number of head_dim = 4"),
        ("*", "yarn_factor", 0.5, "1 or more"),
        ("*", "attention_bias", "keys", "one of none, qkv, all"),
        ("+", "yarn_factor", 0.5, "1 or more"),
        ("+", "qk_rope_head_dim", 5, "an even number"),
        ("*", "head_dim", 2**16 + 2, "at most 65,536 with rotary positions"),
        ("+", "qk_rope_head_dim", 2**16 + 2, "at most 65,536"),
        ("+", "attention_bias", "qkv", "none or all: the pattern has + layers"),
        ("+", "partial_rotary_factor", 0.5, "1.0: the pattern has + layers, which rotate all of qk_rope_head_dim"),
        ("+", "qk_norm", True, "False: the pattern has + layers, which have none"),
        ("+", "attention_sinks", True, "False: the pattern has + layers, which have none"),
    ],
)
def test_attention_refuses_settings_that_it_would_not_follow(letter, field, value, expected):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", *LETTERS[letter][1])}
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**{"pattern": letter, "rope_theta": 1e4, **sizes, field: value})
    assert str(caught.value) == f"ModelConfig.{field} is {value!r}; expected {expected}"


@pytest.mark.parametrize("letter", "*+")
def test_yarn_needs_the_original_context(letter):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", *LETTERS[letter][1])}
    with pytest.raises(ConfigError, match="yarn_original_positions is None; expected a number: yarn_factor is set"):
        ModelConfig(**{"pattern": letter, "rope_theta": 1e4, **sizes, "yarn_factor": 4.0})


def test_the_routers_groups_limit_the_experts_per_token():
    ModelConfig(**{**HYBRID, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 12})
    with pytest.raises(ConfigError, match="num_experts_per_tok is 13; expected at most 12"):
        ModelConfig(**{**HYBRID, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 13})


def test_wsd_needs_decay_steps():
    message = "OptimizerConfig.decay_steps is 0; expected a number above 0"
    assert refusal(OptimizerConfig, schedule="wsd") == message
