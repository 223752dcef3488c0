"""Cross-entropy by chunks of tokens; logits are computed again for the gradient.

Axes: n tokens, d model, v vocabulary of this rank, c chunks.
"""

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.reference import Reduce, token_losses


def cross_entropy_chunked(
    x_nd: Array,
    head_dv: Array,
    columns_n: Array,
    weights_n: Array,
    *,
    chunk: int,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> Array:
    """See `cross_entropy`: never holds more than (chunk, v) logits."""
    chunk = min(chunk, len(x_nd))

    def split(a_n: Array) -> Array:
        pad = -len(a_n) % chunk
        return jnp.pad(a_n, ((0, pad), *[(0, 0)] * (a_n.ndim - 1))).reshape(-1, chunk, *a_n.shape[1:])

    @jax.checkpoint
    def step(x_nd, columns_n, weights_n):
        return jnp.sum(weights_n * token_losses(x_nd, head_dv, columns_n, reduce_max, reduce_sum))

    chunks = jax.tree.map(split, (x_nd, columns_n, weights_n))
    _, losses_c = lax.scan(lambda _, c: (None, step(*c)), None, chunks)
    return jnp.sum(losses_c)
