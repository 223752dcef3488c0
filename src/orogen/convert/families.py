"""Fields of each family's config.json that need more than another name: patterns, derived sizes, and the like."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig
from orogen.convert.fields import ACTIVATION_NAMES, Fields, rotary, rotary_fields


def _heads(fields: Fields) -> dict[str, Any]:
    """Attention's sizes, two of which default to values derived from the others."""
    heads = fields.get("num_attention_heads")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or fields.get("hidden_size") // heads,
    }


HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


def _attributes(config: ModelConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


# nemotron_h

LEAST_STEP = 1e-12  # no step that matters is smaller, and its logarithm is finite
LAYER_TYPES = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}


def _pattern(fields: Fields, text_name: str, list_name: str) -> str | None:
    text, types = fields.get(text_name), fields.get(list_name)
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
    pattern = _pattern(f, "hybrid_override_pattern", "layers_block_type") or "ME*-"
    if set(pattern) - set("M*-E"):
        f.refuse("hybrid_override_pattern", pattern, "letters M, *, - and E, or layers_block_type")
    f.expect("num_hidden_layers", len(pattern))
    f.expect("mamba_hidden_act", "silu")
    f.expect("n_shared_experts", 1)
    depths = f.get("num_nextn_predict_layers")
    block = _pattern(f, "mtp_hybrid_override_pattern", "mtp_layers_block_type") or "*E"
    found = {"pattern": f"{pattern}/{block}" if depths else pattern, "mtp_depths": depths}
    found |= _heads(f) | f.limits("time_step_limit")
    # Its class builds attention without biases, whatever attention_bias says.
    f.read.add("attention_bias")
    found["mlp_hidden_act"] = f.activation("mlp_hidden_act")
    if f.get("mlp_bias"):
        found["moe_bias"] = "shared"
    return found


def _write_nemotron_h(c: ModelConfig) -> dict[str, Any]:
    found = {
        "hybrid_override_pattern": c.layers.main,
        "num_hidden_layers": len(c.layers.main),
        "num_nextn_predict_layers": 1 if c.layers.mtp else 0,
        "attention_bias": False,
        "time_step_limit": _limits(c),
        # transformers 5.23.0 clips steps at time_step_min instead of the lower limit; elsewhere it only initialises.
        "time_step_min": c.time_step_min or LEAST_STEP,
        "n_shared_experts": 1,
        "mlp_hidden_act": ACTIVATION_NAMES[c.mlp_hidden_act],
    }
    if c.layers.mtp:
        found["mtp_hybrid_override_pattern"] = c.layers.mtp
    return found | _attributes(c, *HEADS)


def _limits(c: ModelConfig) -> list[Any]:
    high = {"__float__": "Infinity"} if c.time_step_max is None else c.time_step_max
    return [c.time_step_min or 0.0, high]


# The state-space families


def _read_mamba2(f: Fields) -> dict[str, Any]:
    f.expect("hidden_act", "silu", "swish")
    inner = f.get("num_heads") * f.get("head_dim")
    if f.get("expand") * f.get("hidden_size") != inner:
        f.refuse("expand", f.get("expand"), f"num_heads * head_dim / hidden_size, with {inner} as the numerator")
    return {"pattern": "M" * f.get("num_hidden_layers")} | f.limits("time_step_limit")


def _write_mamba2(c: ModelConfig) -> dict[str, Any]:
    expand = (c.mamba_num_heads or 0) * (c.mamba_head_dim or 0) // c.hidden_size
    return {"num_hidden_layers": len(c.layers.main), "expand": expand, "time_step_limit": _limits(c)}


def _read_mamba(f: Fields) -> dict[str, Any]:
    f.expect("hidden_act", "silu", "swish")
    size, rank = f.get("hidden_size"), f.get("time_step_rank")
    inner = int(f.get("expand") * size)
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


# The transformer families: attention and MLP or experts, alternating


def _alternating(attention: Iterable[str], mlp: Iterable[str]) -> str:
    return "".join(a + m for a, m in zip(attention, mlp, strict=True))


def _halves(c: ModelConfig) -> tuple[str, str]:
    return c.layers.main[::2], c.layers.main[1::2]


def _sliding(letters: str) -> list[str]:
    return ["sliding_attention" if letter == "w" else "full_attention" for letter in letters]


def _kinds(f: Fields, letters: str) -> str:
    """The letters of layer_types, or `letters` if the file has none."""
    types = f.get("layer_types") or _sliding(letters)
    unknown = [kind for kind in types if kind not in ("sliding_attention", "full_attention")]
    if unknown or len(types) != len(letters):
        expected = f"{len(letters)} of 'sliding_attention' and 'full_attention'"
        f.refuse("layer_types", unknown[0] if unknown else types, expected)
    return "".join("w" if kind == "sliding_attention" else "*" for kind in types)


def _read_deepseek(f: Fields) -> dict[str, Any]:
    f.expect("topk_method", "noaux_tc")
    f.expect("scoring_func", "sigmoid")
    f.expect("moe_layer_freq", 1)
    layers, dense = f.get("num_hidden_layers"), f.get("first_k_dense_replace")
    depths, shared = f.get("num_nextn_predict_layers"), f.get("n_shared_experts")
    pattern = "".join("+-" if i < dense else "+E" for i in range(layers))
    found = {"pattern": f"{pattern}/+E" if depths else pattern, "mtp_depths": depths}
    found["attention_bias"] = "all" if f.get("attention_bias") else "none"
    found["mlp_hidden_act"] = f.activation("hidden_act")
    if shared:
        found["moe_shared_expert_intermediate_size"] = shared * f.get("moe_intermediate_size")
    return found | rotary(f)


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
    letter = "*" if f.get("sliding_window") is None else "w"
    found = {"pattern": f"{letter}E" * f.get("num_hidden_layers"), "sliding_window": f.get("sliding_window")}
    return found | _heads(f) | {"mlp_hidden_act": f.activation("hidden_act")} | rotary(f)


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    found = {"num_hidden_layers": len(c.layers.main) // 2, "hidden_act": ACTIVATION_NAMES[c.mlp_hidden_act]}
    return found | _attributes(c, *HEADS, "sliding_window") | rotary_fields(c)


def _qwen_pattern(f: Fields, attention: str) -> str:
    """Experts in every decoder_sparse_step-th layer, but not in those of mlp_only_layers."""
    step, dense = f.get("decoder_sparse_step"), f.get("mlp_only_layers") or []
    mlp = ("-" if i in dense or (i + 1) % step else "E" for i in range(len(attention)))
    return _alternating(attention, mlp)


def _read_qwen2(f: Fields) -> dict[str, Any]:
    layers, most = f.get("num_hidden_layers"), f.get("max_window_layers")
    window = f.get("sliding_window") if f.get("use_sliding_window") else None
    letters = "".join("w" if f.get("use_sliding_window") and i % 2 == 0 and i < most else "*" for i in range(layers))
    found = {"pattern": _qwen_pattern(f, _kinds(f, letters)), "sliding_window": window}
    found["attention_bias"] = "qkv" if f.get("qkv_bias") else "none"
    return found | _heads(f) | {"mlp_hidden_act": f.activation("hidden_act")} | rotary(f)


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    attention, _ = _halves(c)
    found = _write_qwen(c) | {"qkv_bias": c.attention_bias == "qkv", "layer_types": _sliding(attention)}
    found |= {"use_sliding_window": "w" in attention, "max_window_layers": len(attention)}
    return {k: v for k, v in found.items() if k != "head_dim"}


def _read_qwen3(f: Fields) -> dict[str, Any]:
    window = f.get("sliding_window") if f.get("use_sliding_window") else None
    attention = ("*" if window is None else "w") * f.get("num_hidden_layers")
    found = {"pattern": _qwen_pattern(f, attention), "sliding_window": window}
    found["attention_bias"] = "all" if f.get("attention_bias") else "none"
    return found | _heads(f) | {"mlp_hidden_act": f.activation("hidden_act")} | rotary(f)


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    found = {"attention_bias": c.attention_bias == "all", "use_sliding_window": "w" in c.layers.main}
    return _write_qwen(c) | found


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
    found = {"pattern": _alternating(attention, "E" * layers), "sliding_window": f.get("sliding_window")}
    found["attention_bias"] = "all" if f.get("attention_bias") else "none"
    return found | _heads(f) | rotary(f)


def _write_gpt_oss(c: ModelConfig) -> dict[str, Any]:
    attention, mlp = _halves(c)
    found = {"num_hidden_layers": len(mlp), "layer_types": _sliding(attention), "swiglu_alpha": 1.702}
    found |= {"attention_bias": c.attention_bias == "all", "hidden_act": "silu"}
    return found | _attributes(c, *HEADS, "sliding_window") | rotary_fields(c)


def _read_nemotron(f: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {"pattern": "*-" * f.get("num_hidden_layers")}
    found["attention_bias"] = "all" if f.get("attention_bias") else "none"
    found["mlp_hidden_act"] = f.activation("hidden_act")
    return found | _heads(f) | rotary(f, partly=True)


def _write_nemotron(c: ModelConfig) -> dict[str, Any]:
    found = {"num_hidden_layers": len(c.layers.main) // 2, "attention_bias": c.attention_bias == "all"}
    found["hidden_act"] = ACTIVATION_NAMES[c.mlp_hidden_act]
    return found | _attributes(c, *HEADS) | rotary_fields(c, partly=True)


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
        "intermediate_size": f.get("n_inner") or 4 * size,
        "mlp_hidden_act": f.activation("activation_function"),
    }


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": len(c.layers.main) // 2,
        "n_head": c.num_attention_heads,
        "n_inner": c.intermediate_size,
        "activation_function": ACTIVATION_NAMES[c.mlp_hidden_act],
    }


class Rest(NamedTuple):
    """Functions that read our fields from a config.json, and write them."""

    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


REST: dict[str, Rest] = {
    "nemotron_h": Rest(_read_nemotron_h, _write_nemotron_h),
    "mamba2": Rest(_read_mamba2, _write_mamba2),
    "mamba": Rest(_read_mamba, _write_mamba),
    "deepseek_v3": Rest(_read_deepseek, _write_deepseek),
    "mixtral": Rest(_read_mixtral, _write_mixtral),
    "qwen2_moe": Rest(_read_qwen2, _write_qwen2),
    "qwen3_moe": Rest(_read_qwen3, _write_qwen3),
    "gpt_oss": Rest(_read_gpt_oss, _write_gpt_oss),
    "nemotron": Rest(_read_nemotron, _write_nemotron),
    "gpt2": Rest(_read_gpt2, _write_gpt2),
}
