"""Paged attention in two steps: gather each sequence's pages in order, then attend with all scores at once.

Axes: b sequences, t new tokens, h query heads, g key heads, k head size, n pages of the pool, s tokens per page,
p pages per table, c tokens of a sequence in order.
"""

from jax import Array
from jax import numpy as jnp

from orogen.kernels.attention.operands import Operands as WholeOperands
from orogen.kernels.attention.reference import attention_reference
from orogen.kernels.paged_attention.operands import Operands, decoded


def paged_attention_reference(
    o: Operands, *, scale: float, window: int | None, stored: tuple[float, float] | None = None
) -> Array:
    """See `paged_attention`: copies every page of every table, in float32."""
    batch, tokens = o.q_bthk.shape[:2]
    in_order = lambda pool: jnp.take(pool, o.table_bp, axis=0, mode="clip").reshape(batch, -1, *pool.shape[2:])  # noqa: E731
    index_c = jnp.arange(o.table_bp.shape[1] * o.k_nsgk.shape[1])
    q_index_bt = o.length_b[:, None] - tokens + jnp.arange(tokens)
    # Tokens that no query sees may hold anything, even NaN, which a weight of zero would not remove.
    read_bc = index_c < o.length_b[:, None]
    if window is not None:
        read_bc &= index_c > q_index_bt[:, :1] - window
    k_bcgk, v_bcgk = (
        jnp.where(read_bc[..., None, None], decoded(in_order(pool), by, o.q_bthk.dtype).astype(jnp.float32), 0)
        for pool, by in zip((o.k_nsgk, o.v_nsgk), stored or (None, None), strict=True)
    )
    whole = WholeOperands(
        q_bthk=o.q_bthk.astype(jnp.float32),
        k_bsgk=k_bcgk,
        v_bsgk=v_bcgk,
        segments_bt=jnp.zeros((batch, tokens), jnp.int32),
        kv_segments_bs=jnp.zeros(read_bc.shape, jnp.int32),
        q_index=q_index_bt,
        k_index=index_c,
        sinks_h=o.sinks_h,
    )
    return attention_reference(whole, scale=scale, window=window, name=None).astype(o.q_bthk.dtype)
