"""The parameters of each part of a model, from its config alone.

The modules that create the parameters state the same shapes. A test compares the two for every shipped model and each
option. They are repeated here because reading them off the modules takes several seconds to import jax and the model.

Letters of dimensions: d model, f hidden, i inner channels.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig

# Hidden units of the resampler's MLP over its width (model/resampler.py).
RESAMPLER_WIDENING = 4


class Weight(NamedTuple):
    """A parameter: shape, the logical axis of each dimension, and whether it is float32 in any compute dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    float32: bool = False


class Weights(NamedTuple):
    """The parameters of one layer, its norm included, by letter; of the model's other parts (`embedding`, `norm`,
    `head` if it is not tied, `score` of a reward model, the `resampler` of images) by name; and of the
    multi-token-prediction block without its
    layers."""

    layers: dict[str, tuple[Weight, ...]]
    parts: dict[str, tuple[Weight, ...]]
    mtp: tuple[Weight, ...]


@functools.lru_cache(maxsize=256)
def weights(model: ModelConfig, vocab_rows: int | None = None) -> Weights:
    """The parameters of `model`. vocab_rows: rows of the vocabulary with a plan's padding; None: not padded."""
    size, rows = model.hidden_size, vocab_rows or model.vocab_size
    letters = dict.fromkeys(model.layers.main + model.layers.mtp)
    positions = model.learned_positions
    learned = (Weight((positions, size), ("positions", "embed")),) if positions else ()
    parts = {"embedding": (Weight((rows, size), ("vocab", "embed")), *learned), "norm": _norm(model)}
    if not model.tie_word_embeddings:
        parts["head"] = (Weight((size, rows), ("embed", "vocab")),)
    if "x" in model.layers.main:
        parts["resampler"] = tuple(_resampler(model))
    if model.score_head:
        parts["score"] = (_vector(size, "norm"),)
    block = (Weight((2 * size, size), (None, "embed")), *(3 * _norm(model))) if model.layers.mtp else ()
    return Weights({letter: (*LAYER_WEIGHTS[letter](model), *_norm(model)) for letter in letters}, parts, block)


def changed(model: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with other values, which are not checked: its parameters can be counted even if it cannot run."""
    found = copy.copy(model)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


def _vector(size: int, axis: str | None) -> Weight:
    return Weight((size,), (axis,), float32=True)


def _norm(model: ModelConfig, size: int | None = None) -> tuple[Weight, ...]:
    """The scale of a norm, and for a LayerNorm its shift."""
    return (_vector(size or model.hidden_size, "norm"),) * (1 if model.norm.startswith("rms") else 2)


def _attention(model: ModelConfig) -> list[Weight]:
    size, heads = model.hidden_size, model.num_attention_heads
    queries, keys = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    found = _projections(model)
    if model.attention_bias != "none":
        found += [_vector(queries, "heads"), *[_vector(keys, "kv_heads")] * 2]
    if model.attention_bias == "all":
        found.append(_vector(size, "norm"))
    if model.qk_norm:
        found += 2 * _norm(model, model.head_dim)
    return [*found, _vector(heads, "heads")] if model.attention_sinks else found


def _projections(model: ModelConfig) -> list[Weight]:
    """Queries, output, keys and values of attention."""
    size, heads = model.hidden_size, model.num_attention_heads
    queries, keys = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    found = [Weight((size, queries), ("embed", "heads")), Weight((queries, size), ("heads", "embed"))]
    return found + [Weight((size, keys), ("embed", "kv_heads"))] * 2


def _resampler(model: ModelConfig) -> list[Weight]:
    size = model.hidden_size
    mlp = _mlp(model, RESAMPLER_WIDENING * size, bias=False)
    layer = [*_projections(model), *mlp, *(3 * _norm(model))]
    first = [Weight((model.image_feature_size, size), (None, "embed"))]
    first.append(Weight((model.resampler_latents, size), ("positions", "norm")))
    found = [*first, *(layer * model.resampler_layers), *_norm(model)]
    if model.retrieved_captions is None:
        return found
    tables = [Weight((length, size), (None, "embed")) for length in (model.vocab_size, model.caption_tokens)]
    layer = [*_projections(model), *mlp, *(2 * _norm(model))]
    return [*found, *tables, *(layer * model.resampler_layers), *_norm(model)]


def _latent_attention(model: ModelConfig) -> list[Weight]:
    size, heads, rank, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    biased = model.attention_bias == "all"
    up = lambda rank, width: Weight((rank, heads * width), ("embed", "heads"))  # noqa: E731

    def down(width: int) -> list[Weight]:
        return [Weight((size, width), ("embed", None)), *([_vector(width, "norm")] if biased else [])]

    found = [up(size if rank is None else rank, nope + rope)]
    if rank is not None:
        found += [*down(rank), *_norm(model, rank)]
    found += [*down(latent), *down(rope), *_norm(model, latent), up(latent, nope), up(latent, value)]
    found.append(Weight((heads * value, size), ("heads", "embed")))
    return [*found, _vector(size, "norm")] if biased else found


def _mlp(model: ModelConfig, hidden: int, *, bias: bool) -> list[Weight]:
    size, inward = model.hidden_size, 1 + model.mlp_gated
    found = [Weight((size, hidden), ("embed", "mlp"))] * inward + [Weight((hidden, size), ("mlp", "embed"))]
    return [*found, *[_vector(hidden, "mlp")] * inward, _vector(size, "norm")] if bias else found


def _experts(model: ModelConfig) -> list[Weight]:
    size, experts, width = model.hidden_size, model.n_routed_experts, model.expert_width
    hidden, inward = model.moe_intermediate_size, 1 + model.mlp_gated
    found = [Weight((experts, width, hidden), ("expert", "expert_embed", "expert_mlp"))] * inward
    found.append(Weight((experts, hidden, width), ("expert", "expert_mlp", "expert_embed")))
    if model.routed_expert_bias:
        found += [Weight((experts, hidden), ("expert", "expert_mlp"), float32=True)] * inward
        found.append(Weight((experts, width), ("expert", "norm"), float32=True))
    found.append(Weight((size, experts), ("embed", None), float32=True))  # the router
    if model.router_bias:
        found.append(_vector(experts, None))
    if latent := model.moe_latent_size:
        found += [Weight((size, latent), ("embed", None)), Weight((latent, size), (None, "embed"))]
        found += [_vector(latent, None), _vector(size, "norm")] if model.shared_expert_bias else []
    if shared := model.moe_shared_expert_intermediate_size:
        found += _mlp(model, shared, bias=model.shared_expert_bias)
    return [*found, Weight((size, 1), ("embed", None))] if model.moe_shared_expert_gate else found


def _convolution(model: ModelConfig, channels: int, axis: str) -> list[Weight]:
    found = [Weight((channels, model.conv_kernel), (axis, "taps"))]
    return [*found, _vector(channels, axis)] if model.use_conv_bias else found


def _mamba2(model: ModelConfig) -> list[Weight]:
    size, heads = model.hidden_size, model.mamba_num_heads
    inner, states = heads * model.mamba_head_dim, model.n_groups * model.ssm_state_size
    found = [Weight((size, inner), ("embed", "mamba_heads"))] * 2 + [Weight((size, states), ("embed", "groups"))] * 2
    found += [Weight((size, heads), ("embed", "mamba_heads")), Weight((inner, size), ("mamba_heads", "embed"))]
    if model.mamba_proj_bias:
        found += [_vector(inner, "mamba_heads")] * 2 + [_vector(states, "groups")] * 2
        found += [_vector(heads, "mamba_heads"), _vector(size, "norm")]
    found += _convolution(model, inner, "mamba_heads") + _convolution(model, states, "groups") * 2
    # The bias of the time steps, the decays, the skip D, and the gated norm.
    return [*found, *[_vector(heads, "mamba_heads")] * 3, _vector(inner, "mamba_heads")]


def _mamba1(model: ModelConfig) -> list[Weight]:
    size, inner, rank, state = (
        model.hidden_size,
        model.mamba_intermediate_size,
        model.time_step_rank,
        model.ssm_state_size,
    )
    found = [Weight((size, inner), ("embed", "mamba_heads"))] * 2 + [Weight((inner, size), ("mamba_heads", "embed"))]
    if model.mamba_proj_bias:
        found += [_vector(inner, "mamba_heads")] * 2 + [_vector(size, "norm")]
    found += _convolution(model, inner, "mamba_heads")
    found += [Weight((inner, width), ("mamba_heads", None)) for width in (rank, state, state)]
    found.append(Weight((rank, inner), (None, "mamba_heads")))
    found.append(Weight((inner, state), ("mamba_heads", "state"), float32=True))
    return [*found, *[_vector(inner, "mamba_heads")] * 2]


# By letter: the parameters of one layer without its norm.
LAYER_WEIGHTS: dict[str, Callable[[ModelConfig], list[Weight]]] = {
    "M": _mamba2,
    "m": _mamba1,
    "*": _attention,
    "w": _attention,
    "+": _latent_attention,
    "-": lambda model: _mlp(model, model.intermediate_size, bias=model.mlp_bias),
    "E": _experts,
    "x": lambda model: [*_projections(model), _vector(1, "norm")],
    "g": lambda model: [*_mlp(model, model.intermediate_size, bias=model.mlp_bias), _vector(1, "norm")],
}
