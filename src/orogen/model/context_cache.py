"""Pieces of a text that are split over the ranks of `context`, and the caches of `model.slots` that they continue.

Every rank has a copy of the caches. It computes its own tokens of a piece, as in training, and writes the contributions
of all ranks to its copy: keys and values, which are gathered; the last inputs of convolutions; and the states, which
are passed from part to part. So a piece may follow any other piece and begin anywhere in its text.

With one rank of `context`, these functions just call the cache's methods.

Letters: b rows, t time of this rank, k tokens of a convolution's window.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from orogen.layers.documents import Documents
from orogen.model.cache import Reading, require_one_context_rank
from orogen.model.replayed import counts
from orogen.parallel.context import own, taken, whole
from orogen.parallel.plan import Plan


def with_tokens(given: Any, values: Sequence[Array], docs: Documents, plan: Plan) -> Any:
    """The cache of attention with the arrays (b, t, ...) of a piece."""
    require_one_context_rank(plan, given)
    return given.with_piece([whole(a, plan) for a in values], whole_documents(docs, plan))


def reading(kept: Any, docs: Documents, plan: Plan) -> Reading:
    """How this rank's queries of the last piece, which the cache contains, read it."""
    read = kept.reading(whole_documents(docs, plan))
    return read._replace(q_index=own(read.q_index, plan))


def with_inputs(given: Any, inputs: Sequence[Array], state: Any, docs: Documents, plan: Plan, *, window: int) -> Any:
    """The cache of a state-space mixer after a piece whose convolutions, of `window` tokens beside the current one,
    read `inputs` (b, t, c), and which left `state`."""
    if plan.size("context") == 1 or not window:
        return given.with_piece(inputs, state, docs)
    docs = whole_documents(docs, plan)
    count_b1 = counts(docs)[:, None]
    # Only the last tokens, as a piece of their own: no rank has all the others.
    index_bk = jnp.maximum(count_b1 - window, 0) + jnp.arange(window)
    widths = [x_btc.shape[-1] for x_btc in inputs]
    last_bkc = taken(jnp.concatenate(inputs, axis=-1), index_bk, plan)
    splits = [sum(widths[:n]) for n in range(1, len(widths))]
    ending = Documents((index_bk < count_b1).astype(jnp.int32), docs.positions_bt[:, :1] + index_bk)
    return given.with_piece(jnp.split(last_bkc, splits, axis=-1), state, ending)


def whole_documents(docs: Documents, plan: Plan) -> Documents:
    """The documents of all ranks' tokens, in their order."""
    return Documents(*(whole(a, plan) for a in docs))
