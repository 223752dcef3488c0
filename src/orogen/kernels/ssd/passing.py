"""How much is left of a state that enters a row, for rows that continue others.

Axes: b batch, t time, h heads.
"""

from jax import Array
from jax import numpy as jnp

from orogen.kernels.ssd.sums import log_decays


def passed_on(dt_bth: Array, a_h: Array, segments_bt: Array) -> Array:
    """How much of the entering state is left after each token: exp of the sum of dt a so far. (b, t, h) float32

    Zero from the first change of segment on. An entering state S adds this factor times S C_t to y_t of `ssd`, and the
    factor at the last token times S to the final state.
    """
    changes_bt = jnp.cumsum(segments_bt[:, 1:] != segments_bt[:, :-1], axis=1)
    first_bt = jnp.pad(changes_bt, ((0, 0), (1, 0))) == 0
    # Masked before exp: sums past a change of segment are unbounded.
    return jnp.exp(jnp.where(first_bt[..., None], jnp.cumsum(log_decays(dt_bth, a_h), axis=1), -jnp.inf))
