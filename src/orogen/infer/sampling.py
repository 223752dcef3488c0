"""Choosing the next token. Letters: b batch, v vocabulary."""

import jax
import jax.numpy as jnp
from jax import Array


def sample(logits_bv: Array, key: Array, *, temperature: float, top_p: float) -> Array:
    """One token (b,) int32 from softmax(logits / temperature), cut to its nucleus; greedy at temperature 0.

    top_p: the smallest set of most likely tokens whose probability reaches it (arXiv:1904.09751); 1 keeps all.
    """
    if temperature == 0:
        return jnp.argmax(logits_bv, -1).astype(jnp.int32)
    scaled_bv = logits_bv.astype(jnp.float32) / temperature
    if top_p < 1:
        sorted_bv = jnp.sort(jax.nn.softmax(scaled_bv, -1), axis=-1)[:, ::-1]
        before_bv = jnp.cumsum(sorted_bv, -1) - sorted_bv
        least_b1 = jnp.min(jnp.where(before_bv < top_p, sorted_bv, jnp.inf), -1, keepdims=True)
        scaled_bv = jnp.where(jax.nn.softmax(scaled_bv, -1) >= least_b1, scaled_bv, -jnp.inf)
    return jax.random.categorical(key, scaled_bv, axis=-1).astype(jnp.int32)
