"""Floating-point operations of a model, and peaks of devices, for MFU.

Convention: a multiply-add is two operations; causal attention and the SSD's causal part inside a chunk count half; a
window counts the tokens that the average query of a sequence sees, its own by half; experts count by the active width,
convolutions exactly, norms, biases and activations not at all. Training is three times the forward pass, without
recomputation. Documents packed into one sequence count as sequences of their own, and padding counts nothing.
"""

import functools

import numpy as np

from orogen.config.model import ModelConfig
from orogen.cost.kind import costs_of

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
    return costs_of(letter).flops(config, length)
