"""Cross-entropy with all logits at once.

Axes: n tokens, d model, v vocabulary of this rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array
from jax import numpy as jnp

Reduce = Callable[[Array], Array]


class SoftmaxParts(NamedTuple):
    """The token's loss in nats, and what its gradient is made of: exp_nv / total_n is the likelihood."""

    loss_n: Array
    exp_nv: Array
    total_n: Array
    hit_nv: Array


def softmax_parts(
    x_nd: Array, head_dv: Array, columns_n: Array, present_v: Array | None, reduce_max: Reduce, reduce_sum: Reduce
) -> SoftmaxParts:
    """Softmax over all ranks' columns, float32. `columns_n`: the target's column here, out of range on other ranks.
    `present_v`: which columns take part (None: all)."""
    logits_nv = jnp.matmul(x_nd, head_dv, preferred_element_type=jnp.float32)
    hit_nv = columns_n[:, None] == jnp.arange(head_dv.shape[1])
    if present_v is not None:
        logits_nv = jnp.where(present_v, logits_nv, -jnp.inf)  # a rank may have no other; the maximum of all is finite
        hit_nv &= present_v
    max_n = reduce_max(jax.lax.stop_gradient(jnp.max(logits_nv, axis=1)))
    exp_nv = jnp.exp(logits_nv - max_n[:, None])
    target_n = reduce_sum(jnp.sum(jnp.where(hit_nv, logits_nv, 0.0), axis=1))
    total_n = reduce_sum(jnp.sum(exp_nv, axis=1))
    return SoftmaxParts(jnp.log(total_n) + max_n - target_n, exp_nv, total_n, hit_nv)


def cross_entropy_full(
    x_nd: Array,
    head_dv: Array,
    columns_n: Array,
    weights_n: Array,
    present_v: Array | None,
    *,
    chunk: int,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> Array:
    """See `cross_entropy`: holds (n, v) logits, and `chunk` changes nothing."""
    return jnp.sum(weights_n * softmax_parts(x_nd, head_dv, columns_n, present_v, reduce_max, reduce_sum).loss_n)


def log_likelihoods_full(
    x_nd: Array,
    head_dv: Array,
    columns_n: Array,
    present_v: Array | None,
    *,
    chunk: int,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> Array:
    """See `log_likelihoods`: holds (n, v) logits, and `chunk` changes nothing."""
    return -softmax_parts(x_nd, head_dv, columns_n, present_v, reduce_max, reduce_sum).loss_n
