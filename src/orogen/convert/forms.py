"""How each family writes a model down in its config.json: fields by name, and what takes more than a name."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from orogen.config.checks import ABSENT
from orogen.config.model import ModelConfig
from orogen.convert.fields import ACTIVATION_NAMES, REQUIRED, Fields, rotary, rotary_fields


class Form(NamedTuple):
    """How a family writes a model down.

    names: our field, theirs, and its default; fixed: ours that the family implies; read and write: the rest.
    """

    architecture: str
    names: dict[str, tuple[str, Any]]
    fixed: dict[str, Any]
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    tied: bool = False


def _same(*names: str, **defaults: Any) -> dict[str, tuple[str, Any]]:
    return {name: (name, REQUIRED) for name in names} | {name: (name, value) for name, value in defaults.items()}


def _heads(fields: Fields) -> dict[str, Any]:
    """Attention's sizes, of which two may be left to the others."""
    heads = fields.get("num_attention_heads")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", fields.get("hidden_size") // heads),
    }


HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def _attributes(config: ModelConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def mtp_depths(fields: Fields, default: int) -> int:
    """How many multi-token-prediction blocks the file states."""
    return fields.get("num_nextn_predict_layers", default, old=("num_mtp_layers",))


# nemotron_h

LAYER_TYPES = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}


def _pattern(fields: Fields, text_name: str, list_name: str) -> str | None:
    text, types = fields.get(text_name, None), fields.get(list_name, None)
    if types is None:
        return text
    unknown = [kind for kind in types if kind not in LAYER_TYPES]
    if unknown:
        fields.refuse(list_name, unknown[0], "some of " + ", ".join(LAYER_TYPES))
    letters = "".join(LAYER_TYPES[kind] for kind in types)
    if text is not None and text != letters:
        fields.refuse(text_name, text, f"{letters!r}, as {list_name} says")
    return letters


def _read_nemotron_h(f: Fields) -> dict[str, Any]:
    pattern = _pattern(f, "hybrid_override_pattern", "layers_block_type")
    if pattern is None or set(pattern) - set("M*-E"):
        f.refuse("hybrid_override_pattern", pattern, "letters M, *, - and E, or layers_block_type")
        return {}
    f.expect("num_hidden_layers", len(pattern))
    f.expect("mamba_hidden_act", "silu")
    f.expect("n_shared_experts", 1)
    if "E" in pattern:
        f.expect("mlp_bias", False)
    depths = mtp_depths(f, 0)
    block = _pattern(f, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or "*E"
    found = {"pattern": f"{pattern}/{block}" if depths else pattern, "mtp_depths": depths}
    found["layer_norm_epsilon"] = f.get("layer_norm_epsilon", 1e-5, old=("norm_eps", "rms_norm_eps"))
    if "*" in found["pattern"]:
        found |= _heads(f) | {"head_dim": f.get("head_dim", 128, old=("attention_head_dim",))}
    found["attention_bias"] = "all" if f.get("attention_bias", False) else "none"
    found["mlp_hidden_act"] = f.activation("mlp_hidden_act", "relu2")
    for ours, default, old in (
        ("n_groups", 8, "mamba_n_groups"),
        ("conv_kernel", 4, "mamba_d_conv"),
        ("chunk_size", 128, "mamba_chunk_size"),
        ("use_conv_bias", True, "mamba_conv_bias"),
    ):
        found[ours] = f.get(ours, default, old=(old,))
    return found | f.limits("time_step_limit", old=("mamba_dt_limit",))


def _write_nemotron_h(c: ModelConfig) -> dict[str, Any]:
    found = {
        "hybrid_override_pattern": c.layers.main,
        "num_hidden_layers": len(c.layers.main),
        "num_nextn_predict_layers": 1 if c.layers.mtp else 0,
        "attention_bias": c.attention_bias == "all",
        "time_step_limit": _limits(c),
        "n_shared_experts": 1,
    }
    if c.layers.mtp:
        found["mtp_hybrid_override_pattern"] = c.layers.mtp
    names = ("layer_norm_epsilon", "mlp_hidden_act", "n_groups", "conv_kernel", "chunk_size", "use_conv_bias")
    return found | _attributes(c, *HEADS, *names)


def _limits(c: ModelConfig) -> list[Any]:
    high = {"__float__": "Infinity"} if c.time_step_max is None else c.time_step_max
    return [c.time_step_min or 0.0, high]


# The state-space families


def _read_mamba2(f: Fields) -> dict[str, Any]:
    f.expect("hidden_act", "silu", "swish")
    inner = f.get("num_heads") * f.get("head_dim")
    if f.get("expand", 2) * f.get("hidden_size") != inner:
        f.refuse("expand", f.get("expand", 2), f"num_heads * head_dim / hidden_size, with {inner} above the line")
    return {"pattern": "M" * f.get("num_hidden_layers")} | f.limits("time_step_limit")


def _write_mamba2(c: ModelConfig) -> dict[str, Any]:
    expand = (c.mamba_num_heads or 0) * (c.mamba_head_dim or 0) // c.hidden_size
    return {"num_hidden_layers": len(c.layers.main), "expand": expand, "time_step_limit": _limits(c)}


def _read_mamba(f: Fields) -> dict[str, Any]:
    f.expect("hidden_act", "silu", "swish")
    size, rank = f.get("hidden_size"), f.get("time_step_rank", "auto")
    inner = int(f.get("expand", 2) * size)
    f.expect("intermediate_size", inner)
    return {
        "pattern": "m" * f.get("num_hidden_layers"),
        "mamba_intermediate_size": inner,
        "time_step_rank": math.ceil(size / 16) if rank == "auto" else rank,
    }


def _write_mamba(c: ModelConfig) -> dict[str, Any]:
    expand = (c.mamba_intermediate_size or 0) // c.hidden_size
    found = {"num_hidden_layers": len(c.layers.main), "expand": expand}
    return found | _attributes(c, "time_step_rank")


# The transformer families: attention and MLP or experts in turn


def _alternating(attention: Iterable[str], mlp: Iterable[str]) -> str:
    return "".join(a + m for a, m in zip(attention, mlp, strict=True))


def _halves(c: ModelConfig) -> tuple[str, str]:
    return c.layers.main[::2], c.layers.main[1::2]


def _sliding(letters: str) -> list[str]:
    return ["sliding_attention" if letter == "w" else "full_attention" for letter in letters]


def _kinds(f: Fields, letters: str) -> str:
    """The letters of layer_types, or `letters` where the file has none."""
    types = f.get("layer_types", _sliding(letters))
    unknown = [kind for kind in types if kind not in ("sliding_attention", "full_attention")]
    if unknown or len(types) != len(letters):
        expected = f"{len(letters)} of 'sliding_attention' and 'full_attention'"
        f.refuse("layer_types", unknown[0] if unknown else types, expected)
    return "".join("w" if kind == "sliding_attention" else "*" for kind in types)


def _read_deepseek(f: Fields) -> dict[str, Any]:
    f.expect("topk_method", "noaux_tc")
    f.expect("scoring_func", "sigmoid")
    f.expect("moe_layer_freq", 1)
    layers, dense = f.get("num_hidden_layers"), f.get("first_k_dense_replace", 3)
    depths, shared = mtp_depths(f, 1), f.get("n_shared_experts", 0)
    pattern = "".join("+-" if i < dense else "+E" for i in range(layers))
    found = {"pattern": f"{pattern}/+E" if depths else pattern, "mtp_depths": depths}
    found["attention_bias"] = "all" if f.get("attention_bias", False) else "none"
    found["mlp_hidden_act"] = f.activation("hidden_act", "silu")
    if shared:
        found["moe_shared_expert_intermediate_size"] = shared * f.get("moe_intermediate_size")
    return found | rotary(f, theta=1e4)


def _write_deepseek(c: ModelConfig) -> dict[str, Any]:
    width = c.moe_intermediate_size or 1
    return {
        "num_hidden_layers": len(c.layers.main) // 2,
        "first_k_dense_replace": c.layers.main.count("-"),
        "num_nextn_predict_layers": 1 if c.layers.mtp else 0,
        "num_key_value_heads": c.num_attention_heads,
        "n_shared_experts": (c.moe_shared_expert_intermediate_size or 0) // width,
        "attention_bias": c.attention_bias == "all",
        "hidden_act": ACTIVATION_NAMES[c.mlp_hidden_act],
    } | rotary_fields(c)


def _read_mixtral(f: Fields) -> dict[str, Any]:
    letter = "*" if f.get("sliding_window", None) is None else "w"
    found = {"pattern": f"{letter}E" * f.get("num_hidden_layers"), "sliding_window": f.get("sliding_window", None)}
    return found | _heads(f) | {"mlp_hidden_act": f.activation("hidden_act", "silu")} | rotary(f, theta=1e6)


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    found = {"num_hidden_layers": len(c.layers.main) // 2, "hidden_act": ACTIVATION_NAMES[c.mlp_hidden_act]}
    return found | _attributes(c, *HEADS, "sliding_window") | rotary_fields(c)


def _qwen_pattern(f: Fields, attention: str) -> str:
    """Experts in every decoder_sparse_step-th layer, but not in those of mlp_only_layers."""
    step, dense = f.get("decoder_sparse_step", 1), f.get("mlp_only_layers", [])
    mlp = ("-" if i in dense or (i + 1) % step else "E" for i in range(len(attention)))
    return _alternating(attention, mlp)


def _read_qwen2(f: Fields) -> dict[str, Any]:
    layers, window, most = (
        f.get("num_hidden_layers"),
        f.get("use_sliding_window", False),
        f.get("max_window_layers", 28),
    )
    letters = "".join("w" if window and i % 2 == 0 and i < most else "*" for i in range(layers))
    found = {"pattern": _qwen_pattern(f, _kinds(f, letters)), "sliding_window": f.get("sliding_window", 0) or ABSENT}
    found["attention_bias"] = "qkv" if f.get("qkv_bias", True) else "none"
    return found | _heads(f) | {"mlp_hidden_act": f.activation("hidden_act", "silu")} | rotary(f, theta=1e4)


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    attention, _ = _halves(c)
    found = _write_qwen(c) | {"qkv_bias": c.attention_bias == "qkv", "layer_types": _sliding(attention)}
    found |= {"use_sliding_window": "w" in attention, "max_window_layers": len(attention)}
    return {k: v for k, v in found.items() if k != "head_dim"}


def _read_qwen3(f: Fields) -> dict[str, Any]:
    window = f.get("sliding_window", None) if f.get("use_sliding_window", False) else None
    attention = ("*" if window is None else "w") * f.get("num_hidden_layers")
    found = {"pattern": _qwen_pattern(f, attention), "sliding_window": window}
    found["attention_bias"] = "all" if f.get("attention_bias", False) else "none"
    found["n_routed_experts"] = f.get("num_experts", old=("num_local_experts",))
    return found | _heads(f) | {"mlp_hidden_act": f.activation("hidden_act", "silu")} | rotary(f, theta=1e4)


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    found = {"attention_bias": c.attention_bias == "all", "use_sliding_window": "w" in c.layers.main}
    return _write_qwen(c) | found | {"num_experts": c.n_routed_experts}


def _write_qwen(c: ModelConfig) -> dict[str, Any]:
    _, mlp = _halves(c)
    found = {
        "num_hidden_layers": len(mlp),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, letter in enumerate(mlp) if letter == "-"],
        "hidden_act": ACTIVATION_NAMES[c.mlp_hidden_act],
    }
    return found | _attributes(c, *HEADS, "sliding_window") | rotary_fields(c)


def _read_gpt_oss(f: Fields) -> dict[str, Any]:
    f.expect("swiglu_alpha", 1.702)
    f.expect("hidden_act", "silu", "swish")
    layers = f.get("num_hidden_layers")
    attention = _kinds(f, "".join("w*"[i % 2] for i in range(layers)))
    found = {"pattern": _alternating(attention, "E" * layers), "sliding_window": f.get("sliding_window", 128)}
    found["attention_bias"] = "all" if f.get("attention_bias", True) else "none"
    return found | _heads(f) | rotary(f, theta=150000.0)


def _write_gpt_oss(c: ModelConfig) -> dict[str, Any]:
    attention, mlp = _halves(c)
    found = {"num_hidden_layers": len(mlp), "layer_types": _sliding(attention), "swiglu_alpha": 1.702}
    found |= {"attention_bias": c.attention_bias == "all", "hidden_act": "silu"}
    return found | _attributes(c, *HEADS, "sliding_window") | rotary_fields(c)


def _read_nemotron(f: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {"pattern": "*-" * f.get("num_hidden_layers")}
    found["attention_bias"] = "all" if f.get("attention_bias", False) else "none"
    found["mlp_hidden_act"] = f.activation("hidden_act", "relu2")
    return found | _heads(f) | rotary(f, theta=1e4, partial=0.5)


def _write_nemotron(c: ModelConfig) -> dict[str, Any]:
    found = {"num_hidden_layers": len(c.layers.main) // 2, "attention_bias": c.attention_bias == "all"}
    found["hidden_act"] = ACTIVATION_NAMES[c.mlp_hidden_act]
    return found | _attributes(c, *HEADS) | rotary_fields(c, partial=0.5)


def _read_gpt2(f: Fields) -> dict[str, Any]:
    f.expect("scale_attn_weights", True)
    f.expect("scale_attn_by_inverse_layer_idx", False)
    f.expect("add_cross_attention", False)
    size, heads = f.get("n_embd"), f.get("n_head")
    return {
        "pattern": "*-" * f.get("n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size // heads,
        "intermediate_size": f.get("n_inner", 4 * size),
        "mlp_hidden_act": f.activation("activation_function", "gelu_new"),
    }


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": len(c.layers.main) // 2,
        "n_head": c.num_attention_heads,
        "n_inner": c.intermediate_size,
        "activation_function": ACTIVATION_NAMES[c.mlp_hidden_act],
    }


SIZES = _same("vocab_size", "hidden_size")
RMS = {"layer_norm_epsilon": ("rms_norm_eps", 1e-6)}
GATED = {"norm": "rms_cast_first", "mlp_gated": True, "router_correction_bias": False}
BALANCE = _same(router_aux_loss_coef=0.001)
FORMS: dict[str, Form] = {
    "nemotron_h": Form(
        "NemotronHForCausalLM",
        SIZES
        | _same(
            intermediate_size=None,
            mlp_bias=False,
            mamba_num_heads=None,
            mamba_head_dim=None,
            ssm_state_size=None,
            n_routed_experts=None,
            num_experts_per_tok=None,
            moe_intermediate_size=None,
            moe_shared_expert_intermediate_size=None,
            moe_latent_size=None,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            n_group=1,
            topk_group=1,
        )
        | {"mamba_proj_bias": ("use_bias", False)},
        {},
        _read_nemotron_h,
        _write_nemotron_h,
    ),
    "mamba2": Form(
        "Mamba2ForCausalLM",
        SIZES
        | _same(layer_norm_epsilon=1e-5, conv_kernel=4, n_groups=8, chunk_size=256, use_conv_bias=True)
        | {
            "mamba_num_heads": ("num_heads", REQUIRED),
            "mamba_head_dim": ("head_dim", REQUIRED),
            "ssm_state_size": ("state_size", 128),
            "mamba_proj_bias": ("use_bias", False),
        },
        {"norm": "rms_cast_first"},
        _read_mamba2,
        _write_mamba2,
    ),
    "mamba": Form(
        "MambaForCausalLM",
        SIZES
        | _same(layer_norm_epsilon=1e-5, conv_kernel=4, use_conv_bias=True)
        | {"ssm_state_size": ("state_size", 16), "mamba_proj_bias": ("use_bias", False)},
        {"norm": "rms_cast_first"},
        _read_mamba,
        _write_mamba,
        tied=True,
    ),
    "deepseek_v3": Form(
        "DeepseekV3ForCausalLM",
        SIZES
        | RMS
        | _same(
            "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            q_lora_rank=None, intermediate_size=None, moe_intermediate_size=None, n_routed_experts=None,
            num_experts_per_tok=None, norm_topk_prob=True, routed_scaling_factor=2.5, n_group=1, topk_group=1,
            rope_interleave=True,
        ),
        GATED | {"router_score": "sigmoid", "router_correction_bias": True},
        _read_deepseek,
        _write_deepseek,
    ),
    "mixtral": Form(
        "MixtralForCausalLM",
        SIZES
        | BALANCE
        | {
            "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
            "n_routed_experts": ("num_local_experts", 8),
            "num_experts_per_tok": ("num_experts_per_tok", 2),
            "moe_intermediate_size": ("intermediate_size", REQUIRED),
        },
        GATED | {"router_score": "softmax_topk"},
        _read_mixtral,
        _write_mixtral,
    ),
    "qwen2_moe": Form(
        "Qwen2MoeForCausalLM",
        SIZES
        | RMS
        | BALANCE
        | _same("moe_intermediate_size", "num_experts_per_tok", intermediate_size=None, norm_topk_prob=False)
        | {
            "n_routed_experts": ("num_experts", REQUIRED),
            "moe_shared_expert_intermediate_size": ("shared_expert_intermediate_size", REQUIRED),
        },
        GATED | {"router_score": "softmax", "moe_shared_expert_gate": True},
        _read_qwen2,
        _write_qwen2,
    ),
    "qwen3_moe": Form(
        "Qwen3MoeForCausalLM",
        SIZES
        | RMS
        | BALANCE
        | _same("moe_intermediate_size", "num_experts_per_tok", intermediate_size=None, norm_topk_prob=False),
        GATED | {"router_score": "softmax", "qk_norm": True},
        _read_qwen3,
        _write_qwen3,
    ),
    "gpt_oss": Form(
        "GptOssForCausalLM",
        SIZES
        | BALANCE
        | _same(num_experts_per_tok=4, swiglu_limit=7.0)
        | {
            "layer_norm_epsilon": ("rms_norm_eps", 1e-5),
            "n_routed_experts": ("num_local_experts", REQUIRED),
            "moe_intermediate_size": ("intermediate_size", REQUIRED),
        },
        GATED
        | {
            "norm": "rms",
            "router_score": "softmax_topk",
            "router_bias": True,
            "attention_sinks": True,
            "mlp_bias": True,
            "mlp_hidden_act": "silu",
        },
        _read_gpt_oss,
        _write_gpt_oss,
    ),
    "nemotron": Form(
        "NemotronForCausalLM",
        SIZES | _same("intermediate_size", mlp_bias=False) | {"layer_norm_epsilon": ("norm_eps", 1e-5)},
        {"norm": "layer_1p"},
        _read_nemotron,
        _write_nemotron,
    ),
    "gpt2": Form(
        "GPT2LMHeadModel",
        {
            "vocab_size": ("vocab_size", REQUIRED),
            "hidden_size": ("n_embd", REQUIRED),
            "learned_positions": ("n_positions", REQUIRED),
            "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        },
        {"norm": "layer", "attention_bias": "all", "mlp_bias": True},
        _read_gpt2,
        _write_gpt2,
        tied=True,
    ),
}  # fmt: skip
