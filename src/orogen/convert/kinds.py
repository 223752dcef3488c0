"""The form of each field of a config.json, which is checked before a family's reader computes with it."""

from typing import Any

from orogen.config.json_file import ListOf, Number, Record, Whole
from orogen.config.pattern import MAX_LAYERS

SIZE, COUNT = Whole(1), Whole(0)
MAX_EXPERTS = 2**16  # the table of names lists the tensors of each expert
NUMBER = Number()

ROTARY = Record(
    {},
    dict.fromkeys("rope_theta partial_rotary_factor factor beta_fast beta_slow".split(), (NUMBER, None))
    | dict.fromkeys("mscale mscale_all_dim".split(), (NUMBER, None))
    | {"rope_type": str, "type": str, "truncate": (bool, None), "original_max_position_embeddings": (SIZE, None)},
)

KINDS: dict[str, Any] = (
    dict.fromkeys(
        "hidden_size num_attention_heads num_key_value_heads head_dim n_embd n_head n_inner "
        "num_heads moe_intermediate_size intermediate_size decoder_sparse_step max_position_embeddings".split(),
        SIZE,
    )
    | dict.fromkeys("first_k_dense_replace n_shared_experts max_window_layers sliding_window".split(), COUNT)
    | dict.fromkeys("num_hidden_layers n_layer".split(), Whole(1, MAX_LAYERS))
    | dict.fromkeys(["num_nextn_predict_layers"], Whole(0, MAX_LAYERS))
    | dict.fromkeys("n_routed_experts num_experts num_local_experts".split(), Whole(1, MAX_EXPERTS))
    | dict.fromkeys("expand rope_theta partial_rotary_factor".split(), NUMBER)
    | dict.fromkeys("use_sliding_window qkv_bias attention_bias tie_word_embeddings".split(), bool)
    | dict.fromkeys("model_type hidden_act mlp_hidden_act activation_function hybrid_override_pattern".split(), str)
    | dict.fromkeys("layers_block_type mtp_layers_block_type layer_types".split(), ListOf(str))
    | dict.fromkeys(["time_step_limit"], ListOf((float, Record({"__float__": str}))))
    | dict.fromkeys("rope_parameters rope_scaling".split(), ROTARY)
    | {"mtp_hybrid_override_pattern": str, "mlp_only_layers": ListOf(Whole()), "time_step_rank": (SIZE, str)}
)


def kind_of(name: str, default: Any) -> Any:
    """The form of a field: its entry in KINDS, else the type of its default; None if that has no such type."""
    if name in KINDS:
        return KINDS[name]
    return type(default) if isinstance(default, bool | int | float | str | dict | list) else None
