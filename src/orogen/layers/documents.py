"""Which document each token of a row belongs to, and where in it. Letters: b batch, t time."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Documents(NamedTuple):
    """segments_bt: the document of each token, int32, 0 for padding; positions_bt: its place there, int32, from 0."""

    segments_bt: Array
    positions_bt: Array


def documents(segments_bt: Array) -> Documents:
    """Those of whole rows: each run of equal segments is a document, whose positions count from its first token."""
    segments_bt = jnp.asarray(segments_bt)
    index_t = jnp.arange(segments_bt.shape[1])
    first_bt = jnp.diff(segments_bt, axis=1, prepend=segments_bt[:, :1] - 1) != 0
    start_bt = lax.cummax(jnp.where(first_bt, index_t, 0), axis=1)
    return Documents(segments_bt, (index_t - start_bt).astype(jnp.int32))
