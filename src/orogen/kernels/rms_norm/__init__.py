"""RMS norm over groups of channels, gated or not, by implementation name.

Axes: n tokens, c channels.
"""

import functools

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen
from orogen.kernels.rms_norm.reference import Reduce, rms_norm_reference
from orogen.kernels.rms_norm.triton import rms_norm_triton
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "plain": rms_norm_reference,
    "triton": rms_norm_triton,
    "triton_interpreted": functools.partial(rms_norm_triton, interpret=True),
}


def rms_norm(
    x: Array,
    weight_c: Array,
    gate: Array | None = None,
    *,
    group_size: int,
    epsilon: float,
    reduce_sum: Reduce | None = None,
    nested: bool = False,
    implementation: str,
) -> Array:
    """u / sqrt(mean(u²) + ε) · weight, per group of `group_size` channels; (..., c) in x's dtype, float32 inside.

    u is x or, with a gate, x · silu(gate). `reduce_sum` sums over the ranks that share a group; the arrays then hold
    part of one group's channels. None: each group is whole. nested: channels whose weight is 0 are absent: the mean is
    over the others of the group.

    Raises ValueError if shapes disagree, the name is unknown, or the implementation cannot run here or sum over ranks.
    Sources: arXiv:1910.07467; RMSNormGated of state-spaces/mamba, which gates before it normalises.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if nested:
        if implementation != "plain":
            raise ValueError(f"rms_norm={implementation!r} of a model with absent units: expected 'plain'")
        run = functools.partial(run, nested=True)
    channels = x.shape[-1]
    if weight_c.shape != (channels,):
        raise ValueError(f"weight has shape {weight_c.shape}: expected {(channels,)} to match x {x.shape}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate has shape {gate.shape}: expected {x.shape}")
    if channels % min(group_size, channels) or (group_size > channels and reduce_sum is None):
        raise ValueError(f"group_size={group_size}: expected a divisor of {channels} channels")
    x_nc = x.reshape(-1, channels)
    gate_nc = None if gate is None else gate.reshape(-1, channels)
    operands = (x_nc, weight_c.astype(jnp.float32), gate_nc)
    # One varying type inside shard_map: its transpose then sums the weight's gradient over the token shards.
    y_nc = run(*vary_like(operands, operands), group_size=group_size, epsilon=epsilon, reduce_sum=reduce_sum)
    return y_nc.reshape(x.shape)
