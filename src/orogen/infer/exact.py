"""Logits that are the same to the bit however a text is divided into pieces, and whatever is computed beside it.

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
from orogen.model.slots import Paged, SlotState, with_pools, with_tables
from orogen.parallel.plan import Plan

# XLA:CPU compiles the kernels of a program in groups, and below its highest level of optimisation how a kernel is
# compiled depends on those beside it: equal kernels of two programs then round differently (seen on jax 0.10.1).
COMPILER_OPTIONS = {"xla_cpu_parallel_codegen_split_count": 1}


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
) -> tuple[Any, Array]:
    """The caches `layers` with each row's span of its text read, and the logits (b, v) after the span's last token.

    spans: its first place (b,), a multiple of `chunk`, and how many tokens it has (b,); 0: nothing is read and the
    logits mean nothing. leads: see `programs.Layout`.

    A piece is the body of a loop whose length only the data say: XLA then compiles it by itself. It would dissolve a
    loop of one turn in the program around it, and fuse, and so round, differently in different programs.
    """

    def one_row(layers: Any, inputs: Any) -> tuple[Any, Array]:
        row, text_l, table_p, first, count = inputs
        part = _slices(lambda a, lead: lax.dynamic_slice_in_dim(a, row, 1, lead), layers, leads)
        part = with_tables(part, table_p[None])

        def one_piece(number: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            part, logits_v = carry
            here = first + number * chunk
            valid = jnp.minimum(count - number * chunk, chunk)
            place_t = jnp.arange(chunk)
            docs = Documents((place_t < valid).astype(jnp.int32)[None], (here + place_t)[None])
            tokens_t = lax.dynamic_slice_in_dim(text_l, here, chunk)
            h_1td, kept = model.hidden(tokens_t[None], docs, plan, part)
            part = _settled(part, caches_of(kept), valid == chunk)
            h_11d = lax.dynamic_slice_in_dim(plan.enter(h_1td), valid - 1, 1, axis=1)
            return part, model.project(h_11d, plan)[0, 0]

        start = part, jnp.zeros(model.vocab_size, jnp.float32)
        part, logits_v = lax.fori_loop(0, -(-count // chunk), one_piece, start)
        put = lambda a, new, lead: lax.dynamic_update_slice_in_dim(a, new, row, lead)  # noqa: E731
        return _slices(put, with_pools(layers, part), leads, part), logits_v

    rows = jnp.arange(len(text_bl))
    return lax.scan(one_row, layers, (rows, text_bl, table_bp, *spans))


def choose_rows(function: Callable[[Any], Any], inputs: Any, start: Any, live_b: Array) -> Any:
    """The function of each live row by itself, of `start` of the others, in a loop as in `read_rows`."""

    def one_row(row: Array, found: Any) -> Any:
        alone = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, 1), inputs)
        return jax.tree.map(lambda a, new: lax.dynamic_update_slice_in_dim(a, new, row, 0), found, function(alone))

    last = jnp.max(jnp.where(live_b, jnp.arange(len(live_b)) + 1, 0))
    return lax.fori_loop(0, last, one_row, start)


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
