"""Which tokens top-k, top-p and min-p leave to a draw, without a sort. Letters: b batch, v vocabulary."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.varying import vary_like

# Bits of a threshold that one pass over the vocabulary decides. A pass compares with 2**BITS - 1 thresholds: more
# arithmetic, fewer passes.
BITS = 1


def restricted(scaled_bv: Array, top_k_b: Array, top_p_b: Array, min_p_b: Array) -> Array:
    """Logits with -inf for the tokens that are left out: by top_k, of what it keeps by top_p, then by min_p.

    scaled_bv: logits over temperature, shifted to a largest of 0. top_k keeps exactly k tokens, or all if there are
    fewer. top_p keeps the smallest set of most likely tokens whose probability reaches it (arXiv:1904.09751), at least
    one; 1 keeps all. min_p keeps tokens of at least that share of the largest probability (arXiv:2407.01082). Of equal
    tokens the lower index counts as the more likely. transformers and vLLM keep every token that equals the k-th, and
    vLLM applies min_p before top_k.
    """
    likely_bv = _shortest(scaled_bv, lambda kept_bv: kept_bv.sum(-1) >= top_k_b)
    scaled_bv = jnp.where(likely_bv, scaled_bv, -jnp.inf)
    weights_bv = jnp.exp(scaled_bv)
    # The smallest normal number: devices flush a smaller top_p to 0, which no token at all would reach.
    enough_b = jnp.maximum(weights_bv.sum(-1) * top_p_b, jnp.finfo(jnp.float32).tiny)
    nucleus_bv = _shortest(scaled_bv, lambda kept_bv: jnp.where(kept_bv, weights_bv, 0).sum(-1) >= enough_b)
    scaled_bv = jnp.where(nucleus_bv | (top_p_b >= 1)[:, None], scaled_bv, -jnp.inf)
    return jnp.where(weights_bv >= min_p_b[:, None], scaled_bv, -jnp.inf)


def _shortest(scaled_bv: Array, reaches: Callable[[Array], Array]) -> Array:
    """(b, v) bool: the shortest prefix, in order of falling logits and rising indices, whose `reaches` is true.

    All if none does. reaches: (b, v) bool -> (b,) bool, and true for every set that holds one for which it is true.

    Found by radix search: first the smallest logit of the prefix, then the last index with that logit. The bits of
    numbers that are not positive, without their sign, are integers in the order of falling numbers.
    """
    order_bv = lax.bitcast_convert_type(jnp.abs(scaled_bv), jnp.uint32)
    index_v = jnp.arange(scaled_bv.shape[1], dtype=jnp.uint32)
    last_b = _smallest(lambda most_b: reaches(order_bv <= most_b[:, None]), 31, len(scaled_bv))
    above_bv, equal_bv = order_bv < last_b[:, None], order_bv == last_b[:, None]
    bits = max(1, (scaled_bv.shape[1] - 1).bit_length())
    index_b = _smallest(
        lambda most_b: reaches(above_bv | equal_bv & (index_v <= most_b[:, None])), bits, len(scaled_bv)
    )
    return above_bv | equal_bv & (index_v <= index_b[:, None])


def _smallest(reaches: Callable[[Array], Array], bits: int, rows: int) -> Array:
    """(b,) uint32: the smallest number below 2**bits whose `reaches` is true; at least 2**bits - 1 if none is."""

    def pass_over(number: Array, low_b: Array) -> Array:
        unit = jnp.uint32(1) << ((passes - 1 - number) * BITS).astype(jnp.uint32)
        # Of numbers from low on, those below low + digit * unit do not reach if the last of them does not.
        reached = [reaches(low_b + unit * digit - 1) for digit in range(1, 2**BITS)]
        return low_b + unit * sum((~r).astype(jnp.uint32) for r in reached)

    passes, none_b = -(-bits // BITS), jnp.zeros(rows, jnp.uint32)
    return lax.fori_loop(0, passes, pass_over, vary_like(none_b, reaches(none_b)))
