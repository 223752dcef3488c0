"""The Mamba-2 recurrence (state space duality), by implementation name.

Axes: b batch, t time, h heads, p head size, g groups, n state.
"""

import functools

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.ssd.chunked import ssd_chunked
from orogen.kernels.ssd.operands import Operands
from orogen.kernels.ssd.reference import ssd_reference
from orogen.kernels.ssd.triton import ssd_triton
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "recurrence": ssd_reference,
    "chunked": ssd_chunked,
    "triton": ssd_triton,
    "triton_interpreted": functools.partial(ssd_triton, interpret=True),
}


def ssd(
    x_bthp: Array,
    dt_bth: Array,
    a_h: Array,
    b_btgn: Array,
    c_btgn: Array,
    *,
    segments_bt: Array | None = None,
    initial_state_bhpn: Array | None = None,
    skip_h: Array | None = None,
    chunk_size: int,
    implementation: str,
) -> tuple[Array, Array]:
    """Outputs (b, t, h, p) in x's dtype and the state after the last token (b, h, p, n) float32.

        S_t = exp(dt_t a) S_{t-1} + dt_t x_t (outer) B_t        y_t = S_t C_t + D x_t

    Head i reads group i // (h / g). `dt_bth` is the step after softplus, at least 0, `a_h` is negative, `skip_h` is D
    (zero if None). The state is reset to zero wherever `segments_bt` (int) differs from the previous token's. Padding
    (0) is a segment like any other: it neither reads nor feeds a document, and the final state of a row that ends in
    padding is the padding's. `initial_state_bhpn` (zero if None) reaches the row's first segment only.
    Decays, state and sums are float32 whatever the inputs are, except that `triton` multiplies bfloat16 inputs by a
    state rounded to bfloat16. `chunk_size` affects rounding and speed only, and the recurrence ignores it.

    Raises ValueError if the shapes disagree, heads are not a multiple of groups, or a name or size is unknown.
    Source: arXiv:2405.21060, sections 2 and 6.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    if segments_bt is None:
        segments_bt = jnp.zeros(x_bthp.shape[:2], jnp.int32)
    if initial_state_bhpn is None:
        initial_state_bhpn = jnp.zeros((*x_bthp.shape[:1], *x_bthp.shape[2:], *b_btgn.shape[3:]), jnp.float32)
    skip_h = jnp.zeros(x_bthp.shape[2:3], jnp.float32) if skip_h is None else skip_h.astype(jnp.float32)
    initial_state_bhpn = initial_state_bhpn.astype(jnp.float32)
    operands = Operands(x_bthp, dt_bth, a_h, b_btgn, c_btgn, segments_bt, initial_state_bhpn, skip_h)
    _check_shapes(operands)
    # One varying type inside shard_map: its transpose then sums the gradient of a_h over the batch shards.
    return run(vary_like(operands, operands), chunk_size=chunk_size)


def _check_shapes(o: Operands) -> None:
    """Raises ValueError naming the first operand whose shape does not fit x and B."""
    if o.x_bthp.ndim != 4 or o.b_btgn.ndim != 4 or o.x_bthp.shape[1] < 1:
        shapes = f"x {o.x_bthp.shape}, B {o.b_btgn.shape}"
        raise ValueError(f"{shapes}: expected (b, t, h, p) and (b, t, g, n) with t >= 1")
    batch, time, heads, head_size = o.x_bthp.shape
    groups, state = o.b_btgn.shape[2:]
    if heads % groups:
        raise ValueError(f"{heads} heads over {groups} groups: expected a multiple")
    expected = {
        "dt": (o.dt_bth, (batch, time, heads)),
        "a": (o.a_h, (heads,)),
        "B": (o.b_btgn, (batch, time, groups, state)),
        "C": (o.c_btgn, (batch, time, groups, state)),
        "segments": (o.segments_bt, (batch, time)),
        "initial_state": (o.initial_state_bhpn, (batch, heads, head_size, state)),
        "skip": (o.skip_h, (heads,)),
    }
    require_shapes(expected, beside=f"x {o.x_bthp.shape}")
