"""Logits that are the same to the bit however a text is cut, and whatever is computed beside it.

A text is computed in pieces of `chunk` tokens that begin at its multiples, each row by itself, so that every number
comes from one program of one shape. States are kept as they were after the last whole piece; the tokens after it are
read anew with each token that joins them, until they are a whole piece. (vLLM's exact replay buffers the inputs of the
SSM in the same way; here tokens are read anew, since products too depend on the number of rows that they have.)

Letters: b rows, l tokens of a text, t tokens of a piece, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.layers.documents import Documents
from orogen.model.cache import caches as caches_of
from orogen.model.cache import map_layers
from orogen.model.lm import LanguageModel
from orogen.model.slots import Paged, SlotState, with_tables
from orogen.parallel.plan import Plan


def read_rows(
    model: LanguageModel,
    plan: Plan,
    layers: Any,
    text_bl: Array,
    spans: tuple[Array, Array],
    *,
    table_bp: Array,
    leads: Any,
    chunk: int,
    pieces: int,
) -> tuple[Any, Array]:
    """The caches `layers` with each row's span of its text read, and the logits (b, v) after the span's last token.

    spans: its first place (b,), a multiple of `chunk`, and how many tokens it has (b,), at most `chunk * pieces`; 0:
    nothing is read and the logits mean nothing. leads: see `programs.Layout`.
    """

    def one_row(layers: Any, inputs: Any) -> tuple[Any, Array]:
        row, text_l, table_p, first, count = inputs
        part = _slices(lambda a, lead: lax.dynamic_slice_in_dim(a, row, 1, lead), layers, leads)
        part = with_tables(part, table_p[None])

        def one_piece(carry: tuple[Any, Array], number: Array) -> tuple[tuple[Any, Array], None]:
            part, logits_v = carry
            here = first + number * chunk
            valid = jnp.clip(count - number * chunk, 0, chunk)
            place_t = jnp.arange(chunk)
            docs = Documents((place_t < valid).astype(jnp.int32)[None], (here + place_t)[None])
            tokens_t = lax.dynamic_slice_in_dim(text_l, here, chunk)
            h_1td, kept = model.hidden(tokens_t[None], docs, plan, part)
            part = _settled(part, caches_of(kept), valid == chunk)
            h_11d = lax.dynamic_slice_in_dim(plan.enter(h_1td), jnp.maximum(valid - 1, 0), 1, axis=1)
            return (part, jnp.where(valid > 0, model.project(h_11d, plan)[0, 0], logits_v)), None

        start = part, jnp.zeros(model.vocab_size, jnp.float32)
        (part, logits_v), _ = lax.scan(one_piece, start, jnp.arange(pieces))
        put = lambda a, new, lead: lax.dynamic_update_slice_in_dim(a, new, row, lead)  # noqa: E731
        return _slices(put, _with_pools(layers, part), leads, part), logits_v

    rows = jnp.arange(len(text_bl))
    return lax.scan(one_row, layers, (rows, text_bl, table_bp, *spans))


def _settled(before: Any, after: Any, whole: Array) -> Any:
    """Caches after a piece: states only if it was `whole`; what else is written there is written again."""

    def keep(old: Any, new: Any) -> Any:
        if not isinstance(old, SlotState):
            return new
        return jax.tree.map(lambda a, b: jnp.where(whole, b, a), old, new)

    return map_layers(keep, before, after)


def _slices(function: Callable[..., Array], layers: Any, leads: Any, *others: Any) -> Any:
    """The function of each array that has rows, those of others beside it, and its axes in front; pages stay."""

    def each(one: Any, lead: Any, *more: Any) -> Any:
        if isinstance(one, Paged):
            return one
        return jax.tree.map(lambda a, n, *rest: function(a, *rest, n), one, lead, *more)

    return map_layers(each, layers, leads, *others)


def _with_pools(layers: Any, part: Any) -> Any:
    """`layers` with the pages of `part`."""
    pools = lambda old, new: old._replace(values=new.values) if isinstance(old, Paged) else old  # noqa: E731
    return map_layers(pools, layers, part)
