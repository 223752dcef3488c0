"""The Mamba-2 recurrence in chunks: matrix products inside a chunk, a recurrence over the chunks' states.

Axes: b batch, t time, h heads, p head size, g groups, r heads of a group, n state, c chunks,
q position in a chunk, s position in a chunk that q reads from.
"""

from jax import Array, lax
from jax import numpy as jnp

# exp of anything lower is not a normal float32. Cutting here keeps the sums over a chunk small, so that one huge step
# does not cost the digits of the small ones after it.
LOWEST_LOG_DECAY = -88.0


def ssd_chunked(
    x_bthp: Array,
    dt_bth: Array,
    a_h: Array,
    b_btgn: Array,
    c_btgn: Array,
    segments_bt: Array,
    initial_state_bhpn: Array,
    *,
    chunk_size: int,
) -> tuple[Array, Array]:
    """`ssd` by chunks of `chunk_size` tokens; the last one is filled up with steps of length zero."""
    batch, time, heads, head_size = x_bthp.shape
    groups, state = b_btgn.shape[2:]
    width = min(chunk_size, time)
    log_decay_bth = jnp.maximum(dt_bth.astype(jnp.float32) * a_h.astype(jnp.float32), LOWEST_LOG_DECAY)
    dtx_bthp = dt_bth.astype(jnp.float32)[..., None] * x_bthp.astype(jnp.float32)

    dtx_cbhqp = jnp.moveaxis(_chunks(dtx_bthp, width), 3, 2)
    log_decay_cbhq = jnp.moveaxis(_chunks(log_decay_bth, width), 3, 2)
    b_cbgqn = jnp.moveaxis(_chunks(b_btgn.astype(jnp.float32), width), 3, 2)
    c_cbgqn = jnp.moveaxis(_chunks(c_btgn.astype(jnp.float32), width), 3, 2)
    runs_cbq = _chunks(_runs(segments_bt), width, mode="edge")
    carried_cb = jnp.concatenate([jnp.zeros_like(runs_cbq[:1, :, 0]), runs_cbq[:-1, :, -1]])

    grouped = (-1, batch, groups, heads // groups, width)
    dtx_cbgrqp = dtx_cbhqp.reshape(*grouped, head_size)
    sums_cbgrq = jnp.cumsum(log_decay_cbhq, axis=-1).reshape(grouped)

    into_cbgrq = _exp_where((runs_cbq == carried_cb[..., None])[:, :, None, None], sums_cbgrq)
    out_of_cbgrq = _exp_where((runs_cbq == runs_cbq[..., -1:])[:, :, None, None], sums_cbgrq[..., -1:] - sums_cbgrq)
    added_cbgrpn = jnp.einsum("cbgrsp,cbgsn->cbgrpn", dtx_cbgrqp * out_of_cbgrq[..., None], b_cbgqn)
    initial_bgrpn = initial_state_bhpn.reshape(batch, groups, heads // groups, head_size, state)

    def pass_on(state_bgrpn: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        decay_bgr, added_bgrpn = chunk
        return decay_bgr[..., None, None] * state_bgrpn + added_bgrpn, state_bgrpn

    final_bgrpn, states_cbgrpn = lax.scan(pass_on, initial_bgrpn, (into_cbgrq[..., -1], added_cbgrpn))

    same_cbqs = (runs_cbq[..., :, None] == runs_cbq[..., None, :]) & jnp.tri(width, dtype=bool)
    decay_cbgrqs = _exp_where(same_cbqs[:, :, None, None], sums_cbgrq[..., :, None] - sums_cbgrq[..., None, :])
    scores_cbgqs = jnp.einsum("cbgqn,cbgsn->cbgqs", c_cbgqn, b_cbgqn)
    y_cbgrqp = jnp.einsum("cbgrqs,cbgrsp->cbgrqp", scores_cbgqs[:, :, :, None] * decay_cbgrqs, dtx_cbgrqp)
    y_cbgrqp += into_cbgrq[..., None] * jnp.einsum("cbgqn,cbgrpn->cbgrqp", c_cbgqn, states_cbgrpn)

    y_bcqhp = jnp.transpose(y_cbgrqp.reshape(-1, batch, heads, width, head_size), (1, 0, 3, 2, 4))
    y_bthp = y_bcqhp.reshape(batch, -1, heads, head_size)[:, :time].astype(x_bthp.dtype)
    return y_bthp, final_bgrpn.reshape(initial_state_bhpn.shape)


def _exp_where(mask: Array, exponent: Array) -> Array:
    """exp(exponent), or 0 where masked out; masked before exp, so that nothing overflows into a NaN gradient."""
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _runs(segments_bt: Array) -> Array:
    """Number of the contiguous run each token is in, from 0: ids may come back, runs do not."""
    changes_bt = (segments_bt[:, 1:] != segments_bt[:, :-1]).astype(jnp.int32)
    return jnp.pad(jnp.cumsum(changes_bt, axis=1), ((0, 0), (1, 0)))


def _chunks(array_bt: Array, width: int, mode: str = "constant") -> Array:
    """(b, t, ...) to (c, b, q, ...), the tail filled with zeros or with the last token."""
    batch, time = array_bt.shape[:2]
    missing = -time % width
    if missing:
        array_bt = jnp.pad(array_bt, ((0, 0), (0, missing)) + ((0, 0),) * (array_bt.ndim - 2), mode=mode)
    return jnp.moveaxis(array_bt.reshape(batch, -1, width, *array_bt.shape[2:]), 1, 0)
