"""Choosing the next token. Letters: b batch, v vocabulary."""

import jax
import jax.numpy as jnp
from jax import Array


def sample(logits_bv: Array, key: Array, *, temperature: float, top_p: float) -> Array:
    """One token (b,) int32 from softmax(logits / temperature), restricted to its nucleus; greedy at temperature 0.

    top_p: the nucleus is the smallest set of most likely tokens whose probability reaches it, at least one token
    (arXiv:1904.09751); 1 keeps all. Ties go to the lower index, in greedy sampling too. Temperatures below float32's
    smallest normal number, 1.2e-38, which devices flush to 0, are greedy.
    """
    if temperature < jnp.finfo(jnp.float32).tiny:
        return jnp.argmax(logits_bv, -1).astype(jnp.int32)
    scaled_bv = _scaled(logits_bv.astype(jnp.float32), temperature)
    if top_p < 1:
        scaled_bv = jnp.where(_nucleus(scaled_bv, top_p), scaled_bv, -jnp.inf)
    return jax.random.categorical(key, scaled_bv, axis=-1).astype(jnp.int32)


def _scaled(logits_bv: Array, temperature: float) -> Array:
    """Logits / temperature, shifted to a largest of 0 first: a quotient of the largest could overflow."""
    largest_b1 = logits_bv.max(-1, keepdims=True)
    # An infinite difference is inf - inf: 0 among infinite logits, and -inf below them and for excluded tokens.
    below_bv = jnp.where(logits_bv == largest_b1, 0, logits_bv - largest_b1)
    return jnp.where(below_bv == -jnp.inf, -jnp.inf, below_bv / temperature)


def _nucleus(scaled_bv: Array, top_p: float) -> Array:
    """(b, v) bool: whether each token is in the nucleus."""
    order_bv = jnp.argsort(-scaled_bv, axis=-1, stable=True)
    sorted_bv = jnp.take_along_axis(jax.nn.softmax(scaled_bv, -1), order_bv, axis=-1)
    before_bv = jnp.cumsum(sorted_bv, -1) - sorted_bv
    kept_bv = (before_bv < top_p).at[:, 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(kept_bv), order_bv, kept_bv, axis=-1, inplace=False)
