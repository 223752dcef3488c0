"""Cross-entropy with all logits at once.

Axes: n tokens, d model, v vocabulary of this rank.
"""

from typing import NamedTuple

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.cross_entropy.operands import Operands, Reduce


class SoftmaxParts(NamedTuple):
    """Each token's loss in nats, and the parts of its gradient: the softmax is exp_nv / total_n, the target hit_nv.
    logits_nv: those of this rank's columns, -inf for padding."""

    loss_n: Array
    exp_nv: Array
    total_n: Array
    hit_nv: Array
    logits_nv: Array


def softmax_parts(o: Operands, reduce: Reduce) -> SoftmaxParts:
    """Softmax over all ranks' columns, float32."""
    logits_nv = jnp.matmul(o.x_nd, o.head_dv, preferred_element_type=jnp.float32)
    hit_nv = o.columns_n[:, None] == jnp.arange(o.head_dv.shape[1])
    if o.present_v is not None:
        # A rank may hold nothing but padding; the maximum over all ranks is still finite.
        logits_nv = jnp.where(o.present_v, logits_nv, -jnp.inf)
        hit_nv &= o.present_v
    max_n = reduce.max(jax.lax.stop_gradient(jnp.max(logits_nv, axis=1)))
    exp_nv = jnp.exp(logits_nv - max_n[:, None])
    target_n = reduce.sum(jnp.sum(jnp.where(hit_nv, logits_nv, 0.0), axis=1))
    total_n = reduce.sum(jnp.sum(exp_nv, axis=1))
    return SoftmaxParts(jnp.log(total_n) + max_n - target_n, exp_nv, total_n, hit_nv, logits_nv)


def cross_entropy_reference(o: Operands, weights_n: Array, *, chunk: int, reduce: Reduce) -> Array:
    """See `cross_entropy`: holds (n, v) logits and ignores `chunk`."""
    return jnp.sum(weights_n * softmax_parts(o, reduce).loss_n)


def log_likelihoods_reference(o: Operands, *, chunk: int, reduce: Reduce) -> Array:
    """See `log_likelihoods`: holds (n, v) logits and ignores `chunk`."""
    return -softmax_parts(o, reduce).loss_n
