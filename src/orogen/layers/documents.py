"""The document that each token of a row belongs to, and its position there. Letters: b batch, t time."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Documents(NamedTuple):
    """The documents of packed rows.

    segments_bt: int32, each token's document, 0 for padding. As `numbered` gives them, no two documents of a row share
    an id, so a rank that holds part of the row can distinguish them. positions_bt: int32, each token's position in its
    document, from 0.
    """

    segments_bt: Array
    positions_bt: Array


def documents(segments_bt: Array) -> Documents:
    """The documents of whole rows: each run of equal segments is a document, whose positions count from its first
    token."""
    segments_bt = jnp.asarray(segments_bt)
    index_t = jnp.arange(segments_bt.shape[1])
    first_bt = jnp.diff(segments_bt, axis=1, prepend=segments_bt[:, :1] - 1) != 0
    start_bt = lax.cummax(jnp.where(first_bt, index_t, 0), axis=1)
    return Documents(numbered(segments_bt), (index_t - start_bt).astype(jnp.int32))


def numbered(segments_bt: Any) -> Any:
    """int32 ids 1, 2, … of the runs of equal segments along whole rows, 0 for padding: a segment id that recurs later
    in its row is another document. A numpy array if `segments_bt` is one."""
    xp: Any = np if isinstance(segments_bt, np.ndarray) else jnp
    first_bt = xp.diff(segments_bt, axis=1, prepend=xp.zeros_like(segments_bt[:, :1])) != 0
    count_bt = xp.cumsum(first_bt & (segments_bt != 0), axis=1, dtype=xp.int32)
    return xp.where(segments_bt == 0, xp.int32(0), count_bt)
