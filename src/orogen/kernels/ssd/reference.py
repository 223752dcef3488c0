"""The Mamba-2 recurrence token by token: slow and obvious; the fast versions must match it.

Axes: b batch, t time, h heads, p head size, g groups, n state.
"""

from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.ssd.operands import Operands


def ssd_reference(o: Operands, *, chunk_size: int) -> tuple[Array, Array]:
    """`ssd` by `lax.scan` over time; float32 throughout; `chunk_size` is ignored."""
    del chunk_size
    heads_per_group = o.x_bthp.shape[2] // o.b_btgn.shape[2]
    # A row's first token continues the initial state, so it never counts as a change.
    previous_bt = jnp.concatenate([o.segments_bt[:, :1], o.segments_bt[:, :-1]], axis=1)
    keep_bt = (o.segments_bt == previous_bt).astype(jnp.float32)

    def step(state_bhpn: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_bhp, dt_bh, b_bgn, c_bgn, keep_b = token
        b_bhn = jnp.repeat(b_bgn, heads_per_group, axis=1)
        c_bhn = jnp.repeat(c_bgn, heads_per_group, axis=1)
        decay_bh = jnp.exp(dt_bh * o.a_h.astype(jnp.float32)) * keep_b[:, None]
        state_bhpn = decay_bh[..., None, None] * state_bhpn + jnp.einsum("bh,bhp,bhn->bhpn", dt_bh, x_bhp, b_bhn)
        return state_bhpn, jnp.einsum("bhpn,bhn->bhp", state_bhpn, c_bhn)

    tokens = (o.x_bthp, o.dt_bth, o.b_btgn, o.c_btgn, keep_bt)
    time_first = tuple(jnp.moveaxis(array, 1, 0).astype(jnp.float32) for array in tokens)
    final_bhpn, y_tbhp = lax.scan(step, o.initial_state_bhpn, time_first)
    y_bthp = jnp.moveaxis(y_tbhp, 0, 1) + o.skip_h[:, None] * o.x_bthp.astype(jnp.float32)
    return y_bthp.astype(o.x_bthp.dtype), final_bhpn
