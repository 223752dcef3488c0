"""The depthwise causal convolution in front of an SSM.

Axes: b batch, t time, c channels, k taps.
"""

from jax import Array
from jax import numpy as jnp


def causal_conv1d(
    x_btc: Array,
    w_ck: Array,
    bias_c: Array | None = None,
    *,
    segments_bt: Array | None = None,
    halo_bkc: Array | None = None,
    halo_segments_bk: Array | None = None,
) -> Array:
    """y_t = bias + sum_k w[:, k] x_{t - (K-1) + k}, in x's dtype, summed in float32. (b, t, c)

    `w_ck[:, -1]` multiplies the current token. `halo_bkc` holds the K-1 inputs before the first token, oldest first
    (zero if None). With `segments_bt`, a tap that would read across a change of segment reads zero;
    `halo_segments_bk` are the halo's segments, and without them the halo belongs to the first token's segment.

    Raises ValueError if the shapes disagree or halo segments come without a halo and segments.
    Source: arXiv:2312.00752, section 3.4; layout of the weight as in state-spaces/mamba.
    """
    _check_shapes(x_btc, w_ck, bias_c, segments_bt, halo_bkc, halo_segments_bk)
    time, before = x_btc.shape[1], w_ck.shape[1] - 1
    w_ck = w_ck.astype(jnp.float32)
    inputs_btc = _prepend(x_btc, halo_bkc, before)
    follows_bt = None if segments_bt is None or before == 0 else _follows(segments_bt, halo_segments_bk, before)
    y_btc = x_btc.astype(jnp.float32) * w_ck[:, before]
    same_bt = True
    for tap in reversed(range(before)):
        shifted_btc = inputs_btc[:, tap : tap + time].astype(jnp.float32)
        if follows_bt is not None:
            same_bt &= follows_bt[:, tap : tap + time]
            shifted_btc = jnp.where(same_bt[..., None], shifted_btc, 0.0)
        y_btc += shifted_btc * w_ck[:, tap]
    if bias_c is not None:
        y_btc += bias_c.astype(jnp.float32)
    return y_btc.astype(x_btc.dtype)


def _prepend(x_btc: Array, halo_bkc: Array | None, before: int) -> Array:
    """The row behind the `before` inputs that precede it, zero where there is no halo."""
    if before == 0:
        return x_btc
    if halo_bkc is None:
        return jnp.pad(x_btc, ((0, 0), (before, 0), (0, 0)))
    return jnp.concatenate([halo_bkc.astype(x_btc.dtype), x_btc], axis=1)


def _follows(segments_bt: Array, halo_segments_bk: Array | None, before: int) -> Array:
    """Whether each token but the first of halo and row is of the same segment as the one before it."""
    if halo_segments_bk is None:
        halo_segments_bk = jnp.repeat(segments_bt[:, :1], before, axis=1)
    segments_bt = jnp.concatenate([halo_segments_bk, segments_bt], axis=1)
    return segments_bt[:, 1:] == segments_bt[:, :-1]


def _check_shapes(x_btc, w_ck, bias_c, segments_bt, halo_bkc, halo_segments_bk) -> None:
    """Raises ValueError that names the first operand whose shape does not fit x and w."""
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
    for name, (operand, shape) in expected.items():
        if operand is not None and operand.shape != shape:
            raise ValueError(f"{name} has shape {operand.shape}: expected {shape} beside x {x_btc.shape}")
