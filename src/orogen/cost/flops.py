"""Floating-point operations of a model, and peaks of devices, for MFU.

Convention: a multiply-add is two operations; causal attention and the SSD's causal part inside a chunk count half; a
window counts the tokens that the average query of a sequence sees, its own by half; experts count by the active width,
convolutions exactly, norms, biases and activations not at all. Training is three times the forward pass, without
recomputation. Documents packed into one sequence count as sequences of their own, and padding counts nothing.
"""

import functools
from collections.abc import Callable

import numpy as np

from orogen.config.model import ModelConfig

# Dense bfloat16 peak of one device, FLOP/s, by a part of the name that JAX gives it. Source: NVIDIA data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_kind: str) -> float | None:
    """The device's dense bfloat16 peak, FLOP/s; None if it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def training_flops(config: ModelConfig, lengths: np.ndarray) -> float:
    """Forward and backward operations for documents of these lengths in tokens."""
    lengths_d, counts_d = np.unique(lengths, return_counts=True)
    documents = zip(lengths_d.tolist(), counts_d.tolist(), strict=True)
    return sum(count * length * training_flops_per_token(config, length) for length, count in documents)


@functools.cache
def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Forward and backward operations for one token of a sequence of `sequence_length` tokens, one document."""
    return 3 * forward_flops_per_token(config, sequence_length)


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations of the forward pass for one token: layers, MTP block and heads."""
    layer = {letter: layer_flops_per_token(letter, config, sequence_length) for letter in set(config.layers.main)}
    return sum(layer[letter] for letter in config.layers.main) + head_flops_per_token(config, sequence_length)


def head_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Operations after the last layer for one token: the head, and at each MTP depth the block and another head."""
    size = config.hidden_size
    head = 2 * size * config.vocab_size
    block = sum(layer_flops_per_token(letter, config, sequence_length) for letter in config.layers.mtp)
    return head + config.mtp_depths * (head + 2 * 2 * size * size + block)


def layer_flops_per_token(letter: str, config: ModelConfig, length: int) -> float:
    """Operations of one layer of the kind `letter` for one token of a sequence of `length` tokens."""
    return LAYER_FLOPS[letter](config, length)


def _dense_flops(config: ModelConfig, _: int) -> float:
    return 2 * _matrices(config) * config.hidden_size * config.intermediate_size


def _attention_flops(config: ModelConfig, length: int, window: int | None = None) -> float:
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    seen = seen_keys(length, length if window is None else window)
    return 2 * config.hidden_size * (2 * queries + 2 * keys) + 4 * queries * seen


def _cross_attention_flops(config: ModelConfig, _: int) -> float:
    """Of a token that sees an image; the image's own keys and values, and its resampling, are not a token's work."""
    queries = config.num_attention_heads * config.head_dim
    return 4 * config.hidden_size * queries + 4 * queries * config.image_vectors


def _expert_flops(config: ModelConfig, _: int) -> float:
    size, width, latent = config.hidden_size, config.expert_width, config.moe_latent_size or 0
    routed = 2 * _matrices(config) * width * config.moe_intermediate_size * config.num_experts_per_tok
    shared = 2 * _matrices(config) * size * (config.moe_shared_expert_intermediate_size or 0)
    gates = 2 * size * (config.n_routed_experts + config.moe_shared_expert_gate)
    return gates + routed + shared + 4 * size * latent


def _matrices(config: ModelConfig) -> int:
    """The number of matrices of an MLP or an expert."""
    return 3 if config.mlp_gated else 2


def _mamba1_flops(config: ModelConfig, _: int) -> float:
    size, inner, state = config.hidden_size, config.mamba_intermediate_size, config.ssm_state_size
    rank = config.time_step_rank
    projections = 2 * size * 2 * inner + 2 * inner * (rank + 2 * state) + 2 * rank * inner + 2 * inner * size
    # per element of the state: dt · A; decay · S + (dt x) · B; and S · C summed
    scan = (1 + 3 + 2) * inner * state
    return projections + 2 * config.conv_kernel * inner + scan


def seen_keys(length: int, window: int) -> float:
    """Keys that the average query of `length` tokens sees: a triangle, then `window` each, less half its own."""
    window = min(window, length)
    return window * (length - window / 2) / length


def _latent_attention_flops(config: ModelConfig, length: int) -> float:
    size, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    rank = config.q_lora_rank
    queries = size * heads * key if rank is None else rank * (size + heads * key)
    keys = size * (latent + config.qk_rope_head_dim) + latent * heads * (config.qk_nope_head_dim + value)
    return 2 * (queries + keys + heads * value * size) + 2 * heads * (key + value) * seen_keys(length, length)


def _mamba2_flops(config: ModelConfig, length: int) -> float:
    size, heads, state = config.hidden_size, config.mamba_num_heads, config.ssm_state_size
    inner, states = heads * config.mamba_head_dim, config.n_groups * state
    projections = 2 * size * (2 * inner + 2 * states + heads) + 2 * inner * size
    convolution = 2 * config.conv_kernel * (inner + 2 * states)
    chunk = min(config.chunk_size, length)
    inside = 2 * (states + inner) * chunk / 2  # C·B, then its product with x: a causal triangle of the chunk
    across = 2 * 2 * inner * state  # into the chunk's state, and out of the one before
    return projections + convolution + inside + across


# By letter: operations of one layer for one token of a sequence of so many tokens.
LAYER_FLOPS: dict[str, Callable[[ModelConfig, int], float]] = {
    "M": _mamba2_flops,
    "m": _mamba1_flops,
    "*": _attention_flops,
    "w": lambda config, length: _attention_flops(config, length, config.sliding_window),
    "+": _latent_attention_flops,
    "-": _dense_flops,
    "E": _expert_flops,
    "x": _cross_attention_flops,
    "g": _dense_flops,
}
