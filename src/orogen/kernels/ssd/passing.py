"""What becomes of a state that enters a row, for rows that continue others.

Axes: b batch, t time, h heads.
"""

from jax import Array
from jax import numpy as jnp

from orogen.kernels.ssd.chunked import LOWEST_LOG_DECAY


def passed_on(dt_bth: Array, a_h: Array, segments_bt: Array) -> Array:
    """(b, t, h) float32: how much of the entering state is left after each token, exp of the sum of dt a so far; 0 from
    the first change of segment on. With S that state, y_t of `ssd` is more by this times S C_t, and the last state by
    this at the last token times S."""
    log_decay_bth = jnp.maximum(dt_bth.astype(jnp.float32) * a_h.astype(jnp.float32), LOWEST_LOG_DECAY)
    changes_bt = jnp.cumsum(segments_bt[:, 1:] != segments_bt[:, :-1], axis=1)
    first_bt = jnp.pad(changes_bt, ((0, 0), (1, 0))) == 0
    # Masked before exp: what lies behind a change sums up to anything.
    return jnp.exp(jnp.where(first_bt[..., None], jnp.cumsum(log_decay_bth, axis=1), -jnp.inf))
