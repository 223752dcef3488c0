"""The Mamba-1 recurrence token by token: slow and obvious; the fast versions must match it.

Axes: b batch, t time, i channels, n state.
"""

from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.selective_scan.operands import Operands


def selective_scan_reference(o: Operands, *, chunk_size: int) -> tuple[Array, Array]:
    """`selective_scan` by `lax.scan` over time; float32 throughout; `chunk_size` is ignored."""
    del chunk_size
    # A row's first token continues the initial state, so it never counts as a change.
    previous_bt = jnp.concatenate([o.segments_bt[:, :1], o.segments_bt[:, :-1]], axis=1)
    keep_bt = (o.segments_bt == previous_bt).astype(jnp.float32)

    def step(state_bin: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_bi, dt_bi, B_bn, C_bn, keep_b = token
        decay_bin = jnp.exp(dt_bi[:, :, None] * o.A_in.astype(jnp.float32)) * keep_b[:, None, None]
        state_bin = decay_bin * state_bin + jnp.einsum("bi,bi,bn->bin", dt_bi, x_bi, B_bn)
        return state_bin, jnp.einsum("bin,bn->bi", state_bin, C_bn)

    tokens = (o.x_bti, o.dt_bti, o.B_btn, o.C_btn, keep_bt)
    time_first = tuple(jnp.moveaxis(array, 1, 0).astype(jnp.float32) for array in tokens)
    final_bin, y_tbi = lax.scan(step, o.initial_state_bin, time_first)
    return jnp.moveaxis(y_tbi, 0, 1).astype(o.x_bti.dtype), final_bin
