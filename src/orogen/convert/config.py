"""A Hugging Face config.json as a ModelConfig, and back, for each family of `names`.

What has an effect that we do not implement is refused; what has none is ignored, and kept for the way back.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.convert.fields import Fields
from orogen.convert.forms import FORMS, mtp_depths

# What no config.json states and no output depends on: how a model trains, and where its pipeline is cut.
FREE = ("router_aux_loss_coef", "router_z_loss_coef", "mtp_loss_scale", "mtp_depths", "chunk_size")
# The letters whose layers read a field; a field that is not here, all do.
READ_BY = {
    "*w+": "num_attention_heads attention_bias rope_theta partial_rotary_factor rope_interleave yarn_factor "
    "yarn_original_positions yarn_beta_fast yarn_beta_slow yarn_mscale yarn_mscale_all_dim yarn_truncate",
    "*w": "num_key_value_heads head_dim qk_norm attention_sinks",
    "w": "sliding_window",
    "+": "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim",
    "-": "intermediate_size",
    "-E": "mlp_hidden_act mlp_gated mlp_bias swiglu_limit",
    "M": "mamba_num_heads mamba_head_dim n_groups chunk_size mamba_norm_groups time_step_min time_step_max",
    "m": "mamba_intermediate_size time_step_rank",
    "Mm": "ssm_state_size conv_kernel use_conv_bias mamba_proj_bias",
    "E": "n_routed_experts num_experts_per_tok moe_intermediate_size moe_shared_expert_intermediate_size "
    "moe_shared_expert_gate moe_latent_size router_score router_bias router_correction_bias norm_topk_prob "
    "routed_scaling_factor n_group topk_group router_aux_loss_coef router_z_loss_coef",
}
LETTERS = {field: letters for letters, fields in READ_BY.items() for field in fields.split()}


def relevant(pattern: str, field: str) -> bool:
    """Whether a layer of the pattern reads the field."""
    return bool(set(LETTERS.get(field, pattern)) & set(pattern))


def difference(first: ModelConfig, second: ModelConfig, *, free: Iterable[str] = ()) -> str | None:
    """The first field in which two models differ, None where they are the same; pipeline cuts are none."""
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name == "pattern":
            a, b = (first.layers.main, first.layers.mtp), (second.layers.main, second.layers.mtp)
        if a != b and field.name not in free and relevant(first.pattern, field.name):
            return field.name
    return None


def read_config(values: dict[str, Any], *, mtp: bool = True) -> tuple[str, ModelConfig]:
    """The family and the model that a config.json describes. Raises ConfigError.

    mtp: whether its files hold a multi-token-prediction block: transformers loses the block and keeps the field.
    """
    try:
        return _read_config(Fields(values), mtp=mtp)
    except (TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"config.json: {error}; expected fields of the types that transformers writes") from None


def _read_config(fields: Fields, *, mtp: bool) -> tuple[str, ModelConfig]:
    family = fields.get("model_type")
    if family not in FORMS:
        fields.refuse("model_type", family, "one of " + ", ".join(FORMS))
    fields.expect("quantization_config")
    form = FORMS[family]
    found = {ours: fields.get(theirs, default) for ours, (theirs, default) in form.names.items()}
    found |= form.fixed
    found |= form.read(fields)
    found["tie_word_embeddings"] = fields.get("tie_word_embeddings", form.tied)
    if not mtp:
        found["pattern"] = found["pattern"].split("/")[0]
        found.pop("mtp_depths", None)
    return family, ModelConfig(**{k: v for k, v in found.items() if relevant(found["pattern"], k)})


def mtp_blocks(values: dict[str, Any]) -> int:
    """How many multi-token-prediction blocks a config.json says its files hold, if they hold any."""
    return max(1, mtp_depths(Fields(values), 0))


def write_config(family: str, config: ModelConfig, kept: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model: `kept`, the one it came with, with what it says of the model brought up to date.

    Raises ConfigError, naming the field, if the family cannot hold such a model.
    """
    if kept is not None and kept.get("model_type") == family:
        if difference(config, read_config(kept, mtp=bool(config.layers.mtp))[1], free=FREE) is None:
            return kept
    form = FORMS[family]
    fresh = {theirs: getattr(config, ours) for ours, (theirs, _) in form.names.items()}
    fresh = {k: v for k, v in fresh.items() if v is not None}
    fresh |= form.write(config)
    fresh |= {
        "architectures": [form.architecture],
        "model_type": family,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    field = difference(config, read_config(fresh)[1], free=FREE)
    if field is not None:
        raise ConfigError(
            f"ModelConfig.{field} is {getattr(config, field)!r}; expected what Hugging Face's {family} can have"
        )
    reader = Fields(kept or {})
    if kept:
        form.read(reader)
    stale = reader.read | {theirs for theirs, _ in form.names.values()}
    return {k: v for k, v in (kept or {}).items() if k not in stale} | fresh


def family_of(config: ModelConfig) -> str:
    """The family whose checkpoints can hold the model. Raises ConfigError: why nemotron_h cannot, if none can."""
    refusals = []
    for family in FORMS:
        try:
            write_config(family, config)
            return family
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]
