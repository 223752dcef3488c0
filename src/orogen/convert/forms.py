"""Each family's names for our fields in its config.json, and the fields whose values it implies."""

from collections.abc import Callable
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig
from orogen.convert.families import REST
from orogen.convert.fields import Fields


class Form(NamedTuple):
    """How a family states a model in its config.json.

    names: their name for each of our fields; fixed: our fields that the family implies; read and write: the rest.
    """

    architecture: str
    names: dict[str, str]
    fixed: dict[str, Any]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


SIZES = _same("vocab_size", "hidden_size", "tie_word_embeddings")
RMS = {"layer_norm_epsilon": "rms_norm_eps"}
GATED = {"norm": "rms_cast_first", "mlp_gated": True, "router_correction_bias": False}
BALANCE = _same("router_aux_loss_coef")
FORMS: dict[str, Form] = {
    "nemotron_h": Form(
        "NemotronHForCausalLM",
        SIZES
        | _same(
            "layer_norm_epsilon", "intermediate_size", "mlp_bias", "mamba_num_heads", "mamba_head_dim", "n_groups",
            "conv_kernel", "chunk_size", "use_conv_bias", "ssm_state_size", "n_routed_experts", "num_experts_per_tok",
            "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "norm_topk_prob",
            "routed_scaling_factor", "n_group", "topk_group",
        )
        | {"mamba_proj_bias": "use_bias"},
        {},
        *REST["nemotron_h"],
    ),
    "mamba2": Form(
        "Mamba2ForCausalLM",
        SIZES
        | _same("layer_norm_epsilon", "conv_kernel", "n_groups", "chunk_size", "use_conv_bias")
        | {
            "mamba_num_heads": "num_heads",
            "mamba_head_dim": "head_dim",
            "ssm_state_size": "state_size",
            "mamba_proj_bias": "use_bias",
        },
        {"norm": "rms_cast_first"},
        *REST["mamba2"],
    ),
    "mamba": Form(
        "MambaForCausalLM",
        SIZES
        | _same("layer_norm_epsilon", "conv_kernel", "use_conv_bias")
        | {"ssm_state_size": "state_size", "mamba_proj_bias": "use_bias"},
        {"norm": "rms_cast_first"},
        *REST["mamba"],
    ),
    "deepseek_v3": Form(
        "DeepseekV3ForCausalLM",
        SIZES
        | RMS
        | _same(
            "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank",
            "intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "norm_topk_prob",
            "routed_scaling_factor", "n_group", "topk_group", "rope_interleave",
        ),
        GATED | {"router_score": "sigmoid", "router_correction_bias": True},
        *REST["deepseek_v3"],
    ),
    "mixtral": Form(
        "MixtralForCausalLM",
        SIZES
        | RMS
        | BALANCE
        | _same("num_experts_per_tok")
        | {"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        GATED | {"router_score": "softmax_topk"},
        *REST["mixtral"],
    ),
    "qwen2_moe": Form(
        "Qwen2MoeForCausalLM",
        SIZES
        | RMS
        | BALANCE
        | _same("moe_intermediate_size", "num_experts_per_tok", "intermediate_size", "norm_topk_prob")
        | {
            "n_routed_experts": "num_experts",
            "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
        },
        GATED | {"router_score": "softmax", "moe_shared_expert_gate": True},
        *REST["qwen2_moe"],
    ),
    "qwen3_moe": Form(
        "Qwen3MoeForCausalLM",
        SIZES
        | RMS
        | BALANCE
        | _same("moe_intermediate_size", "num_experts_per_tok", "intermediate_size", "norm_topk_prob")
        | {"n_routed_experts": "num_experts"},
        GATED | {"router_score": "softmax", "qk_norm": True},
        *REST["qwen3_moe"],
    ),
    "gpt_oss": Form(
        "GptOssForCausalLM",
        SIZES
        | RMS
        | BALANCE
        | _same("num_experts_per_tok", "swiglu_limit")
        | {"n_routed_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        GATED
        | {
            "norm": "rms",
            "router_score": "softmax_topk",
            "router_bias": True,
            "attention_sinks": True,
            "mlp_bias": True,
            "mlp_hidden_act": "silu",
        },
        *REST["gpt_oss"],
    ),
    "nemotron": Form(
        "NemotronForCausalLM",
        SIZES | _same("intermediate_size", "mlp_bias") | {"layer_norm_epsilon": "norm_eps"},
        {"norm": "layer_1p"},
        *REST["nemotron"],
    ),
    "gpt2": Form(
        "GPT2LMHeadModel",
        _same("vocab_size", "layer_norm_epsilon", "tie_word_embeddings")
        | {"hidden_size": "n_embd", "learned_positions": "n_positions"},
        {"norm": "layer", "attention_bias": "all", "mlp_bias": True},
        *REST["gpt2"],
    ),
}  # fmt: skip
