"""The parameters of each layer from its config: shapes and logical axes, for models too large to build. No jax here."""

from collections.abc import Callable
from typing import NamedTuple

from orogen.config.model import ModelConfig


class Weight(NamedTuple):
    """A parameter: shape, the logical axis of each dimension, and whether it is float32 in any compute dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    float32: bool = False


def end_weights(model: ModelConfig, vocab_rows: int | None = None) -> list[Weight]:
    """The embeddings, the final norm and, if it is not tied, the head; the embedding's matrix comes first.
    vocab_rows: rows of the vocabulary that a plan has padded; None: not padded."""
    size, vocabulary, positions = model.hidden_size, vocab_rows or model.vocab_size, model.learned_positions
    weights = [Weight((vocabulary, size), ("vocab", "embed")), *_norm(model)]
    if positions:
        weights.append(Weight((positions, size), ("positions", "embed")))
    return weights if model.tie_word_embeddings else [*weights, Weight((size, vocabulary), ("embed", "vocab"))]


def mtp_weights(model: ModelConfig) -> list[Weight]:
    """The multi-token-prediction block without its layers."""
    return [_matrix(2 * model.hidden_size, model.hidden_size, None, "embed"), *_norm(model) * 3]


def layer_weights(letter: str, model: ModelConfig) -> list[Weight]:
    """One layer of a letter of the pattern, its norm included."""
    return _norm(model) + LAYER_WEIGHTS[letter](model)


def _vector(size: int, axis: str | None, present: bool = True) -> list[Weight]:
    return [Weight((size,), (axis,), float32=True)] if present else []


def _matrix(rows: int, columns: int, *axes: str | None) -> Weight:
    return Weight((rows, columns), axes)


def _norm(model: ModelConfig, size: int | None = None) -> list[Weight]:
    """The weight and, for layer norms, a bias."""
    return _vector(size or model.hidden_size, "norm") * (2 if model.norm.startswith("layer") else 1)


def _mlp(model: ModelConfig, hidden: int, *, bias: bool) -> list[Weight]:
    size, inward = model.hidden_size, 2 if model.mlp_gated else 1
    matrices = [_matrix(size, hidden, "embed", "mlp")] * inward + [_matrix(hidden, size, "mlp", "embed")]
    return matrices + _vector(hidden, "mlp", bias) * inward + _vector(size, "norm", bias)


def _dense_weights(model: ModelConfig) -> list[Weight]:
    return _mlp(model, model.intermediate_size, bias=model.mlp_bias)


def _attention_weights(model: ModelConfig) -> list[Weight]:
    size, heads = model.hidden_size, model.num_attention_heads
    queries, keys = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    biased = model.attention_bias != "none"
    return [
        _matrix(size, queries, "embed", "heads"),
        *[_matrix(size, keys, "embed", "kv_heads")] * 2,
        _matrix(queries, size, "heads", "embed"),
        *_vector(queries, "heads", biased),
        *_vector(keys, "kv_heads", biased) * 2,
        *_vector(size, "norm", model.attention_bias == "all"),
        *(_norm(model, model.head_dim) * 2 if model.qk_norm else []),
        *_vector(heads, "heads", model.attention_sinks),
    ]


def _latent_weights(model: ModelConfig) -> list[Weight]:
    size, heads, rank, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    biased = model.attention_bias == "all"
    up = lambda rank, width: _matrix(rank, heads * width, "embed", "heads")  # noqa: E731
    down = lambda width: [_matrix(size, width, "embed", None), *_vector(width, "norm", biased)]  # noqa: E731
    queries = [up(size, nope + rope)] if rank is None else [*down(rank), *_norm(model, rank), up(rank, nope + rope)]
    keys = [*down(latent), *_norm(model, latent), *down(rope), up(latent, nope), up(latent, value)]
    return [*queries, *keys, _matrix(heads * value, size, "heads", "embed"), *_vector(size, "norm", biased)]


def _convolution(model: ModelConfig, channels: int, axis: str) -> list[Weight]:
    return [_matrix(channels, model.conv_kernel, axis, "taps"), *_vector(channels, axis, model.use_conv_bias)]


def _mamba2_weights(model: ModelConfig) -> list[Weight]:
    size, heads, biased = model.hidden_size, model.mamba_num_heads, model.mamba_proj_bias
    inner, states = heads * model.mamba_head_dim, model.n_groups * model.ssm_state_size
    project = lambda width, axis: [_matrix(size, width, "embed", axis), *_vector(width, axis, biased)]  # noqa: E731
    return [
        *project(inner, "mamba_heads") * 2,
        *project(states, "groups") * 2,
        *project(heads, "mamba_heads"),
        *_convolution(model, inner, "mamba_heads"),
        *_convolution(model, states, "groups") * 2,
        *_vector(heads, "mamba_heads") * 3,  # of dt, A and D
        *_vector(inner, "mamba_heads"),
        _matrix(inner, size, "mamba_heads", "embed"),
        *_vector(size, "norm", biased),
    ]


def _mamba1_weights(model: ModelConfig) -> list[Weight]:
    size, inner, biased = model.hidden_size, model.mamba_intermediate_size, model.mamba_proj_bias
    rank, state = model.time_step_rank, model.ssm_state_size
    return [
        *[_matrix(size, inner, "embed", "mamba_heads"), *_vector(inner, "mamba_heads", biased)] * 2,
        *_convolution(model, inner, "mamba_heads"),
        *(_matrix(inner, width, "mamba_heads", None) for width in (rank, state, state)),
        _matrix(rank, inner, None, "mamba_heads"),
        *_vector(inner, "mamba_heads") * 2,  # of dt, and D
        _matrix(inner, state, "mamba_heads", "state"),
        _matrix(inner, size, "mamba_heads", "embed"),
        *_vector(size, "norm", biased),
    ]


def _expert_weights(model: ModelConfig) -> list[Weight]:
    size, experts, width = model.hidden_size, model.n_routed_experts, model.expert_width
    hidden, latent, shared = (
        model.moe_intermediate_size,
        model.moe_latent_size,
        model.moe_shared_expert_intermediate_size,
    )
    inward = 2 if model.mlp_gated else 1
    up = Weight((experts, width, hidden), ("expert", "expert_embed", "expert_mlp"))
    down = Weight((experts, hidden, width), ("expert", "expert_mlp", "expert_embed"))
    biases = [Weight((experts, hidden), ("expert", "expert_mlp"), True)] * inward
    biases.append(Weight((experts, width), ("expert", "norm"), True))
    return [
        Weight((size, experts), ("embed", None), float32=True),
        *_vector(experts, None, model.router_bias),
        *[up] * inward,
        down,
        *(biases if model.routed_expert_bias else []),
        *([_matrix(size, latent, "embed", None), _matrix(latent, size, None, "embed")] if latent else []),
        *(_vector(latent, None) + _vector(size, "norm") if latent and model.shared_expert_bias else []),
        *(_mlp(model, shared, bias=model.shared_expert_bias) if shared else []),
        *([_matrix(size, 1, "embed", None)] if model.moe_shared_expert_gate else []),
    ]


# By letter: what one mixer has.
LAYER_WEIGHTS: dict[str, Callable[[ModelConfig], list[Weight]]] = {
    "M": _mamba2_weights,
    "m": _mamba1_weights,
    **dict.fromkeys("*w", _attention_weights),
    "+": _latent_weights,
    "-": _dense_weights,
    "E": _expert_weights,
}
