"""The depthwise causal convolution in front of an SSM, with its activation, by implementation name.

Axes: b batch, t time, c channels, k taps.
"""

import functools

from jax import Array
from jax import numpy as jnp

from orogen.kernels.causal_conv1d.operands import Operands
from orogen.kernels.causal_conv1d.reference import causal_conv1d_reference
from orogen.kernels.causal_conv1d.triton import causal_conv1d_triton
from orogen.kernels.checks import chosen, require_shapes
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "taps": causal_conv1d_reference,
    "triton": causal_conv1d_triton,
    "triton_interpreted": functools.partial(causal_conv1d_triton, interpret=True),
}
ACTIVATIONS = ("none", "silu")


def causal_conv1d(
    x_btc: Array,
    w_ck: Array,
    bias_c: Array | None = None,
    *,
    segments_bt: Array | None = None,
    halo_bkc: Array | None = None,
    halo_segments_bk: Array | None = None,
    activation: str = "none",
    implementation: str,
) -> Array:
    """y_t = act(bias + sum_k w[:, k] x_{t - (K-1) + k}), (b, t, c), computed in float32, returned in x's dtype.

    `w_ck[:, -1]` multiplies the current token. `halo_bkc` holds the K-1 inputs before the first token, oldest first
    (zero if None). With `segments_bt`, a tap that would read across a change of segment reads zero;
    `halo_segments_bk` are the halo's segments, and without them the halo belongs to the first token's segment.
    `activation` is none or silu.

    Raises ValueError if the shapes disagree, a name is unknown, halo segments come without a halo and segments, or the
    implementation cannot run here.
    Source: arXiv:2312.00752, section 3.4; layout of the weight as in state-spaces/mamba.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {list(ACTIVATIONS)}")
    _check_shapes(x_btc, w_ck, bias_c, segments_bt, halo_bkc, halo_segments_bk)
    batch, time, channels = x_btc.shape
    before = w_ck.shape[1] - 1
    if halo_bkc is not None:
        halo_bkc = halo_bkc.astype(x_btc.dtype)
    if segments_bt is None:
        segments_bt = jnp.zeros((batch, time), jnp.int32)
    if halo_bkc is not None and halo_segments_bk is None:
        halo_segments_bk = jnp.repeat(segments_bt[:, :1], before, axis=1)
    bias_c = jnp.zeros(channels, jnp.float32) if bias_c is None else bias_c.astype(jnp.float32)
    reach_bt = _reach(segments_bt, halo_segments_bk, before)
    operands = Operands(x_btc, w_ck.astype(jnp.float32), bias_c, halo_bkc, reach_bt)
    # One varying type inside shard_map: its transpose then sums the weights' gradient over the token shards.
    return run(vary_like(operands, operands), activation=activation)


def _reach(segments_bt: Array, halo_segments_bk: Array | None, before: int) -> Array:
    """(b, t) int32: how many preceding tokens, at most `before`, the taps of each token may read."""
    if halo_segments_bk is None:
        seen = jnp.pad(segments_bt[:, 1:] == segments_bt[:, :-1], ((0, 0), (before + 1, 0)))[:, 1:]
    else:
        segments_bt = jnp.concatenate([halo_segments_bk, segments_bt], axis=1)
        seen = segments_bt[:, 1:] == segments_bt[:, :-1]
    # seen[:, before - 1 + t] says whether token t is in the same segment as its predecessor.
    time = segments_bt.shape[1] - (0 if halo_segments_bk is None else before)
    reach_bt = jnp.zeros((segments_bt.shape[0], time), jnp.int32)
    unbroken_bt = jnp.ones(reach_bt.shape, bool)
    for tap in reversed(range(before)):
        unbroken_bt &= seen[:, tap : tap + time]
        reach_bt += unbroken_bt
    return reach_bt


def _check_shapes(x_btc, w_ck, bias_c, segments_bt, halo_bkc, halo_segments_bk) -> None:
    """Raises ValueError naming the first operand whose shape does not fit x and w."""
    if x_btc.ndim != 3 or w_ck.ndim != 2 or w_ck.shape[0] != x_btc.shape[2]:
        raise ValueError(f"x {x_btc.shape}, w {w_ck.shape}: expected (b, t, c) and (c, k)")
    batch, time, channels = x_btc.shape
    before = w_ck.shape[1] - 1
    if halo_segments_bk is not None and (segments_bt is None or halo_bkc is None):
        raise ValueError("halo_segments without segments and a halo: expected all three")
    expected = {
        "bias": (bias_c, (channels,)),
        "segments": (segments_bt, (batch, time)),
        "halo": (halo_bkc, (batch, before, channels)),
        "halo_segments": (halo_segments_bk, (batch, before)),
    }
    require_shapes(expected, beside=f"x {x_btc.shape}")
