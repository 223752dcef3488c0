"""Whether each token's target is the most likely one, together with its log-likelihood.

Axes: n tokens (of one chunk inside a step), v vocabulary of this rank.
"""

from typing import NamedTuple

from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.chunked import split
from orogen.kernels.cross_entropy.operands import Operands, Reduce
from orogen.kernels.cross_entropy.reference import softmax_parts


class Judged(NamedTuple):
    """Of each target (n,): its log-likelihood, float32, and whether greedy decoding would choose it."""

    log_likelihood: Array
    greedy: Array


def judged_chunked(o: Operands, *, chunk: int, reduce: Reduce) -> Judged:
    """See `judge`: never holds more than (chunk, v) logits."""

    def step(_, tokens):
        x_nd, columns_n = tokens
        parts = softmax_parts(o._replace(x_nd=x_nd, columns_n=columns_n), reduce)
        best_n, top_n = jnp.argmax(parts.logits_nv, axis=1), jnp.max(parts.logits_nv, axis=1)
        # Columns relative to this rank's first one, so that a rank before it has negative ones: the lowest column of
        # all ranks that reach the maximum, relative to the target, is what greedy decoding would choose.
        beyond_n = jnp.where(top_n == reduce.max(top_n), best_n - columns_n, jnp.iinfo(jnp.int32).max)
        lowest_n = -reduce.max(-beyond_n)
        return None, Judged(-parts.loss_n, lowest_n == 0)

    _, found = lax.scan(step, None, split((o.x_nd, o.columns_n), min(chunk, len(o.x_nd))))
    return Judged(*(x_cn.reshape(-1)[: len(o.x_nd)] for x_cn in found))
