"""The Mamba-1 recurrence (selective scan), by implementation name.

Axes: b batch, t time, i channels, n state.
"""

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.selective_scan.chunked import selective_scan_chunked
from orogen.kernels.selective_scan.operands import Operands
from orogen.kernels.selective_scan.reference import selective_scan_reference
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {"reference": selective_scan_reference, "chunked": selective_scan_chunked}


def selective_scan(
    x_bti: Array,
    dt_bti: Array,
    A_in: Array,
    B_btn: Array,
    C_btn: Array,
    *,
    segments_bt: Array | None = None,
    initial_state_bin: Array | None = None,
    chunk_size: int,
    implementation: str,
) -> tuple[Array, Array]:
    """Outputs (b, t, i) in x's dtype and the state after the last token (b, i, n) float32.

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        y_t = S_t C_t

    `dt_bti` is the step after softplus, `A_in` is negative; the skip D x_t is the caller's. The state is reset to zero
    wherever `segments_bt` (int) differs from the previous token's. Padding (0) is a segment like any other: it neither
    reads nor feeds a document, and the final state of a row that ends in padding is the padding's.
    `initial_state_bin` (zero if None) reaches the row's first segment only. Decays, state and sums are float32
    whatever the inputs are. `chunk_size` affects memory and speed only, and the reference ignores it.

    Raises ValueError if the shapes disagree, or a name or size is unknown.
    Source: arXiv:2312.00752, section 3.2 and algorithm 2.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1")
    if segments_bt is None:
        segments_bt = jnp.zeros(x_bti.shape[:2], jnp.int32)
    if initial_state_bin is None:
        initial_state_bin = jnp.zeros((*x_bti.shape[:1], *x_bti.shape[2:], *B_btn.shape[2:]), jnp.float32)
    operands = Operands(x_bti, dt_bti, A_in, B_btn, C_btn, segments_bt, initial_state_bin.astype(jnp.float32))
    _check_shapes(operands)
    # One varying type inside shard_map: its transpose then sums the gradient of A_in over the batch shards.
    return run(vary_like(operands, operands), chunk_size=chunk_size)


def _check_shapes(o: Operands) -> None:
    """Raises ValueError naming the first operand whose shape does not fit x and B."""
    if o.x_bti.ndim != 3 or o.B_btn.ndim != 3 or o.x_bti.shape[1] < 1:
        raise ValueError(f"x {o.x_bti.shape}, B {o.B_btn.shape}: expected (b, t, i) and (b, t, n) with t >= 1")
    batch, time, channels = o.x_bti.shape
    state = o.B_btn.shape[2]
    expected = {
        "dt": (o.dt_bti, (batch, time, channels)),
        "A": (o.A_in, (channels, state)),
        "B": (o.B_btn, (batch, time, state)),
        "C": (o.C_btn, (batch, time, state)),
        "segments": (o.segments_bt, (batch, time)),
        "initial_state": (o.initial_state_bin, (batch, channels, state)),
    }
    require_shapes(expected, beside=f"x {o.x_bti.shape}")
