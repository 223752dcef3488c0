"""The tokens that a model finds most likely, without holding the logits of a whole batch.

Axes: n tokens (of one chunk inside a step), e model, v vocabulary of this rank, k most likely tokens.
"""

from collections.abc import Callable

from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.chunked import split
from orogen.kernels.cross_entropy.operands import Reduce
from orogen.kernels.divergence.operands import Likely


def most_likely(
    x_ne: Array,
    head_ev: Array,
    count: int,
    *,
    chunk: int,
    vocab_start: Array | int = 0,
    vocab_size: int | None = None,
    reduce: Reduce,
    gather: Callable[[Array], Array] = lambda x: x,
) -> Likely:
    """The `count` most likely tokens (n, k) of each token, the most likely first, and their log-probabilities; of equal
    ones the lower ids. Has no gradient.

    Arguments as those of `cross_entropy`. gather: concatenates (n, k) of all ranks of the vocabulary along k. Raises
    ValueError if the vocabulary, or all ranks together, have fewer columns.
    """
    if vocab_size is not None and count > vocab_size:  # columns of padding are no tokens
        raise ValueError(f"the {count} most likely of {vocab_size} tokens; expected at most as many")
    columns = head_ev.shape[1]
    own = min(count, columns)

    def step(_, tokens):
        logits_nv = jnp.matmul(tokens[0], head_ev, preferred_element_type=jnp.float32)
        if vocab_size is not None:
            logits_nv = jnp.where(jnp.arange(columns) + vocab_start < vocab_size, logits_nv, -jnp.inf)
        max_n = reduce.max(jnp.max(logits_nv, axis=1))
        log_total_n = jnp.log(reduce.sum(jnp.sum(jnp.exp(logits_nv - max_n[:, None]), axis=1))) + max_n
        # The best of all ranks are among the first `count` of each.
        best_nk, column_nk = lax.top_k(logits_nv, own)
        best_nk, id_nk = gather(best_nk), gather(column_nk + vocab_start)
        if best_nk.shape[1] < count:
            raise ValueError(f"the {count} most likely of {best_nk.shape[1]} tokens; expected at most as many")
        best_nk, place_nk = lax.top_k(best_nk, count)
        return None, Likely(jnp.take_along_axis(id_nk, place_nk, axis=1), best_nk - log_total_n[:, None])

    _, found = lax.scan(step, None, split((x_ne,), min(chunk, len(x_ne))))
    return Likely(*(x_cnk.reshape(-1, count)[: len(x_ne)] for x_cnk in found))
