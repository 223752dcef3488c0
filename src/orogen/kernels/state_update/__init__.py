"""One token's step of the Mamba-2 and the Mamba-1 recurrence, for decoding, by implementation name.

Axes: b batch, h heads, p head size, g groups, n state, i channels.
"""

import functools
from typing import Any

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.state_blocks import Blocks, count
from orogen.kernels.state_update.operands import Operands, SelectiveOperands
from orogen.kernels.state_update.reference import selective_update_reference, ssm_update_reference
from orogen.kernels.state_update.triton import selective_update_triton, ssm_update_triton
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "reference": ssm_update_reference,
    "triton": ssm_update_triton,
    "triton_interpreted": functools.partial(ssm_update_triton, interpret=True),
}
SELECTIVE_IMPLEMENTATIONS = {
    "reference": selective_update_reference,
    "triton": selective_update_triton,
    "triton_interpreted": functools.partial(selective_update_triton, interpret=True),
}


def ssm_update(
    x_bhp: Array,
    dt_bh: Array,
    a_h: Array,
    b_bgn: Array,
    c_bgn: Array,
    *,
    state_bhpn: Array | Blocks,
    skip_h: Array | None = None,
    active_b: Array | None = None,
    seeds_b2: Array | None = None,
    implementation: str,
) -> tuple[Array, Any]:
    """Outputs (b, h, p) in x's dtype and the state after the token (b, h, p, n), in the state's dtype.

        S' = exp(dt a) S + dt x (outer) B        y = S' C + D x

    Letters and signs are those of `ssd`. Decay, update and sums are float32. Sequences where `active_b` (bool; None:
    all) is False keep their state to the bit and give zeros. A float32 state is stored as it is; one in float16 or in
    int8 blocks (`state_blocks`) is rounded at random (`kernels.stochastic`), which needs `seeds_b2`: two uint32 words
    per sequence, different for every token and layer, which together with an element's index in the state determine its
    rounding. y is computed from the state before rounding.
    `triton` reads and writes the state once, in place if the caller donates it; it needs an NVIDIA GPU.

    Raises ValueError if shapes, dtypes and seeds disagree, heads are not a multiple of groups, or the name is unknown
    or cannot run here. Source: arXiv:2405.21060, section 2.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    dt_bh, a_h = dt_bh.astype(jnp.float32), a_h.astype(jnp.float32)
    skip_h = jnp.zeros(a_h.shape, jnp.float32) if skip_h is None else skip_h.astype(jnp.float32)
    active_b = jnp.ones(x_bhp.shape[:1], bool) if active_b is None else active_b
    operands = Operands(state_bhpn, x_bhp, dt_bh, a_h, b_bgn, c_bgn, skip_h, active_b, seeds_b2)
    _check_ssm(operands)
    return run(vary_like(operands, operands))


def selective_update(
    x_bi: Array,
    dt_bi: Array,
    A_in: Array,
    B_bn: Array,
    C_bn: Array,
    *,
    state_bin: Array | Blocks,
    active_b: Array | None = None,
    seeds_b2: Array | None = None,
    implementation: str,
) -> tuple[Array, Any]:
    """Outputs (b, i) in x's dtype and the state after the token (b, i, n), in the state's dtype.

        S' = exp(dt A) S + dt x (outer) B        y = S' C

    Letters and signs are those of `selective_scan`, and the skip D x is the caller's, as there. Everything else is as
    in `ssm_update`. Source: arXiv:2312.00752, section 3.2.
    """
    run = chosen(SELECTIVE_IMPLEMENTATIONS, implementation)
    if x_bi.ndim != 2 or B_bn.ndim != 2:
        raise ValueError(f"x {x_bi.shape}, B {B_bn.shape}: expected (b, i) and (b, n)")
    (batch, channels), state = x_bi.shape, B_bn.shape[1]
    _require_stored(state_bin, seeds_b2)
    expected = {
        "dt": (dt_bi, (batch, channels)),
        "A": (A_in, (channels, state)),
        "B": (B_bn, (batch, state)),
        "C": (C_bn, (batch, state)),
        **_of_state(state_bin, (batch, channels, state)),
        **_of_rows(active_b, seeds_b2, batch),
    }
    require_shapes(expected, beside=f"x {x_bi.shape}")
    active_b = jnp.ones(batch, bool) if active_b is None else active_b
    dt_bi, A_in = dt_bi.astype(jnp.float32), A_in.astype(jnp.float32)
    operands = SelectiveOperands(state_bin, x_bi, dt_bi, A_in, B_bn, C_bn, active_b, seeds_b2)
    return run(vary_like(operands, operands))


def _check_ssm(o: Operands) -> None:
    """Raises ValueError naming the first operand that does not fit x and B."""
    if o.x_bhp.ndim != 3 or o.b_bgn.ndim != 3:
        raise ValueError(f"x {o.x_bhp.shape}, B {o.b_bgn.shape}: expected (b, h, p) and (b, g, n)")
    (batch, heads, head_size), (groups, state) = o.x_bhp.shape, o.b_bgn.shape[1:]
    if not groups or heads % groups:
        raise ValueError(f"{heads} heads over {groups} groups: expected a multiple")
    _require_stored(o.state_bhpn, o.seeds_b2)
    expected = {
        "dt": (o.dt_bh, (batch, heads)),
        "a": (o.a_h, (heads,)),
        "B": (o.b_bgn, (batch, groups, state)),
        "C": (o.c_bgn, (batch, groups, state)),
        **_of_state(o.state_bhpn, (batch, heads, head_size, state)),
        "skip": (o.skip_h, (heads,)),
        **_of_rows(o.active_b, o.seeds_b2, batch),
    }
    require_shapes(expected, beside=f"x {o.x_bhp.shape}")


def _of_rows(active_b: Array | None, seeds_b2: Array | None, batch: int) -> dict[str, Any]:
    return {"active": (active_b, (batch,)), "seeds": (seeds_b2, (batch, 2))}


def _of_state(state: Array | Blocks, shape: tuple[int, ...]) -> dict[str, Any]:
    if not isinstance(state, Blocks):
        return {"state": (state, shape)}
    return {"state": (state.values, shape), "scales": (state.scales, (*shape[:-1], count(shape[-1])))}


def _require_stored(state_b: Array | Blocks, seeds_b2: Array | None) -> None:
    """`require_state`; int8 blocks need seeds too."""
    if not isinstance(state_b, Blocks):
        return require_state(state_b, seeds_b2)
    dtypes = state_b.values.dtype, state_b.scales.dtype
    if dtypes != (jnp.int8, jnp.float32):
        raise ValueError(f"blocks of {dtypes[0]} with scales of {dtypes[1]}: expected int8 and float32")
    if seeds_b2 is None or seeds_b2.dtype != jnp.uint32:
        given = "no seeds" if seeds_b2 is None else f"seeds of {seeds_b2.dtype}"
        raise ValueError(f"state of int8 with {given}: expected seeds of uint32")


def require_state(state_b: Array, seeds_b2: Array | None) -> None:
    """Raises ValueError unless the state is float32 and there are no seeds, or float16 and there are some."""
    if state_b.dtype not in (jnp.float32, jnp.float16):
        raise ValueError(f"state of {state_b.dtype}: expected float32 or float16")
    if (state_b.dtype == jnp.float16) != (seeds_b2 is not None):
        given = "no seeds" if seeds_b2 is None else "seeds"
        raise ValueError(f"state of {state_b.dtype} with {given}: expected seeds for float16, and none for float32")
    if seeds_b2 is not None and seeds_b2.dtype != jnp.uint32:
        raise ValueError(f"seeds of {seeds_b2.dtype}: expected uint32")
