"""The Mamba-1 recurrence one token after another: slow, obvious, and what the fast versions must equal.

Axes: b batch, t time, i channels, n state.
"""

from jax import Array, lax
from jax import numpy as jnp


def selective_scan_reference(
    x_bti: Array,
    dt_bti: Array,
    A_in: Array,
    B_btn: Array,
    C_btn: Array,
    segments_bt: Array,
    initial_state_bin: Array,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """`selective_scan` by `lax.scan` over time; float32 throughout, and `chunk_size` has no meaning here."""
    del chunk_size
    # A row's first token continues the initial state, so it never counts as a change.
    previous_bt = jnp.concatenate([segments_bt[:, :1], segments_bt[:, :-1]], axis=1)
    keep_bt = (segments_bt == previous_bt).astype(jnp.float32)

    def step(state_bin: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_bi, dt_bi, B_bn, C_bn, keep_b = token
        decay_bin = jnp.exp(dt_bi[:, :, None] * A_in.astype(jnp.float32)) * keep_b[:, None, None]
        state_bin = decay_bin * state_bin + jnp.einsum("bi,bi,bn->bin", dt_bi, x_bi, B_bn)
        return state_bin, jnp.einsum("bin,bn->bi", state_bin, C_bn)

    tokens = (x_bti, dt_bti, B_btn, C_btn, keep_bt)
    time_first = tuple(jnp.moveaxis(array, 1, 0).astype(jnp.float32) for array in tokens)
    final_bin, y_tbi = lax.scan(step, initial_state_bin, time_first)
    return jnp.moveaxis(y_tbi, 0, 1).astype(x_bti.dtype), final_bin
