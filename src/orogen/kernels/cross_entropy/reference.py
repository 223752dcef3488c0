"""Cross-entropy with all logits at once.

Axes: n tokens, d model, v vocabulary of this rank.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax import numpy as jnp

Reduce = Callable[[Array], Array]


def token_losses(x_nd: Array, head_dv: Array, columns_n: Array, reduce_max: Reduce, reduce_sum: Reduce) -> Array:
    """Negative log-likelihood (n,) in nats, float32. `columns_n`: the target's column, out of range on other ranks."""
    logits_nv = jnp.matmul(x_nd, head_dv, preferred_element_type=jnp.float32)
    max_n = reduce_max(jax.lax.stop_gradient(jnp.max(logits_nv, axis=1)))
    hit_nv = columns_n[:, None] == jnp.arange(head_dv.shape[1])
    target_n = reduce_sum(jnp.sum(jnp.where(hit_nv, logits_nv, 0.0), axis=1))
    total_n = reduce_sum(jnp.sum(jnp.exp(logits_nv - max_n[:, None]), axis=1))
    return jnp.log(total_n) + max_n - target_n


def cross_entropy_full(
    x_nd: Array,
    head_dv: Array,
    columns_n: Array,
    weights_n: Array,
    *,
    chunk: int,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> Array:
    """See `cross_entropy`: holds (n, v) logits, and `chunk` changes nothing."""
    return jnp.sum(weights_n * token_losses(x_nd, head_dv, columns_n, reduce_max, reduce_sum))
