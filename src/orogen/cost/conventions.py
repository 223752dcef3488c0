"""A model's FLOPs per trained token by the conventions of published tables; none counts recomputation.

orogen: `cost.flops`. megatron2021: equation 3 of arXiv:2104.04473 with 72 in place of 96, since it includes
recomputation: products with weight matrices, and every pair of tokens in attention. megatron2024: what Megatron-LM has
reported since 2024, `num_floating_point_operations` in megatron/training/training.py: causal attention by half; routers
and convolutions not at all. For patterns with Mamba it takes twice the hidden size for Mamba's inner width, whatever
the config says, and leaves out the projection of the MTP block. Its numbers can be compared with its own only.
"""

from collections.abc import Callable

from orogen.config.model import ModelConfig
from orogen.cost.flops import layer_flops_per_token, training_flops_per_token


def flops_per_token(convention: str, model: ModelConfig, length: int) -> float:
    """Forward and backward FLOPs for one token of a sequence of `length` tokens, one document. Raises KeyError."""
    return CONVENTIONS[convention](model, length)


def _megatron(model: ModelConfig, length: int, seen: float, projected: bool) -> float:
    """seen: the share of the token pairs that attention counts. projected: whether the MTP block's projection does."""
    depths, size = model.mtp_depths, model.hidden_size
    layer = {letter: _layer(letter, model, length, seen) for letter in set(model.layers.main + model.layers.mtp)}
    forward = sum(layer[letter] for letter in model.layers.main)
    forward += depths * sum(layer[letter] for letter in model.layers.mtp)
    forward += 2 * size * model.vocab_size * (1 + depths)
    return 3 * (forward + (depths * 2 * (2 * size * size + 3 * size) if projected else 0))


def _layer(letter: str, model: ModelConfig, length: int, seen: float) -> float:
    size, matrices = model.hidden_size, 3 if model.mlp_gated else 2
    if letter in "*w":
        queries, keys = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
        return 4 * size * (queries + keys) + 4 * queries * length * seen
    if letter == "+":
        return _latent_attention(model, length, seen)
    if letter == "-":
        return 2 * matrices * size * model.intermediate_size
    if letter == "E":
        width, latent = model.expert_width, model.moe_latent_size or 0
        routed = width * model.moe_intermediate_size * model.num_experts_per_tok
        shared = size * (model.moe_shared_expert_intermediate_size or 0)
        return 2 * matrices * (routed + shared) + 4 * size * latent
    if letter not in "Mm":  # a letter that Megatron does not have
        return layer_flops_per_token(letter, model, length)
    inner = 2 * size
    states = 2 * (model.n_groups or 1) * model.ssm_state_size
    heads = model.mamba_num_heads or 0
    return 2 * size * (2 * inner + states + heads) + 7 * inner * model.ssm_state_size + 2 * inner * size


def _latent_attention(model: ModelConfig, length: int, seen: float) -> float:
    size, heads, latent, rank = model.hidden_size, model.num_attention_heads, model.kv_lora_rank, model.q_lora_rank
    key, value = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    queries = size * heads * key if rank is None else rank * (size + heads * key + 1)  # one more for its norm
    keys = latent * (size + heads * (model.qk_nope_head_dim + value) + 1) + size * model.qk_rope_head_dim
    return 2 * (queries + keys + heads * value * size + length * seen * heads * (key + value))


CONVENTIONS: dict[str, Callable[[ModelConfig, int], float]] = {
    "orogen": training_flops_per_token,
    "megatron2021": lambda model, length: _megatron(model, length, 1.0, True),
    "megatron2024": lambda model, length: _megatron(model, length, 0.5, not set("Mm") & set(model.layers.main)),
}
