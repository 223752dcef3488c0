"""Drafts that are looked up in the text itself, and the tokens of texts.

Letters: b rows, t time, n drafts, l tokens of a text.
"""

import jax
import jax.numpy as jnp
from jax import Array

from orogen.layers.documents import Documents

NONE = -1  # in place of a token: none was emitted, drafted or given
LONGEST = 3  # tokens of the end of a text that prompt lookup looks for earlier in it


def look_up(text_bl: Array, end_b: Array, count: int) -> Array:
    """(b, count) int32: what followed the last tokens of each text where they last occurred before, the longest such
    end of at most LONGEST tokens; NONE where they did not, or beyond the text. end_b: the last token's place.

    Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding."""
    place_l = jnp.arange(text_bl.shape[1])
    length_bl = jnp.zeros(text_bl.shape, jnp.int32)
    same_bl = jnp.ones(text_bl.shape, bool)
    for back in range(LONGEST):
        token_b1 = at(text_bl, jnp.maximum(end_b - back, 0))
        earlier_bl = jnp.pad(text_bl, ((0, 0), (back, 0)), constant_values=NONE)[:, : text_bl.shape[1]]
        same_bl &= (earlier_bl == token_b1) & (place_l >= back) & (end_b[:, None] >= back)
        length_bl += same_bl
    # Longest first, then latest; the end of the text itself does not count.
    rank_bl = jnp.where(place_l < end_b[:, None], length_bl * text_bl.shape[1] + place_l, NONE)
    found_b = jnp.argmax(rank_bl, axis=1)
    index_bn = found_b[:, None] + 1 + jnp.arange(count)
    drafts_bn = jnp.take_along_axis(text_bl, index_bn, axis=1, mode="clip")
    known_bn = (at(length_bl, found_b) > 0) & (index_bn <= end_b[:, None]) & (end_b[:, None] > 0)
    return jnp.where(known_bn, drafts_bn, NONE)


def written(text_bl: Array, tokens_bt: Array, docs: Documents) -> Array:
    """The text with the tokens at their places."""
    index_bt = jnp.where(docs.segments_bt != 0, docs.positions_bt, text_bl.shape[1])
    return jax.vmap(lambda text_l, index_t, tokens_t: text_l.at[index_t].set(tokens_t, mode="drop"))(
        text_bl, index_bt, tokens_bt
    )


def at(x_bt: Array, index_b: Array) -> Array:
    """(b, 1, …): of each row what is at its own index."""
    index = index_b.reshape(-1, *(1,) * (x_bt.ndim - 1))
    return jnp.take_along_axis(x_bt, index, axis=1)
