"""Caches: what layers keep of earlier tokens, so that a sequence may come in pieces, the last of them single tokens.

A mixer makes its cache in `start` and names its logical axes in `cache_axes`. Both call an allocator, which decides
the form of the cache: `Rows` here, or `Slots`, for an engine, in `model.slots`.

Pieces are consecutive: the documents of a piece are those of the whole row at the same positions, and every document of
a row has an id of its own. The whole row at once and any division of it into pieces give the same outputs and gradients
up to rounding, if experts drop no token: capacity is counted per piece. If `tensor` does not divide the tokens of a
piece, such as a single one, the plan is `Plan.decoding()`, which splits the rows of the batch instead. On a mesh, a jax
loop over pieces needs the result of `start` marked as varying like what is kept (`parallel.varying.vary_like`).

Letters: b batch, t time of a piece, s slots, k tokens of a convolution's window.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.kernels.selective_scan import selective_scan
from orogen.kernels.ssd import ssd
from orogen.layers.documents import Documents
from orogen.parallel.plan import Plan

# The segment of slots that were never written; no document has it.
EMPTY = -1


class KeyValues(NamedTuple):
    """What attention reads of earlier tokens, in order of arrival.

    values: arrays (b, s, …), keys and values or what they are computed from; segments_bs: the document of each slot,
    int32, EMPTY after the last token; length_b: the number of tokens of each row so far, int32, which may differ.
    Tokens past the last slot are lost, and outputs are wrong from there on: the caller, which chooses the number of
    slots, must count the tokens.
    """

    values: Any  # typed for arrays and for their logical axes
    segments_bs: Any
    length_b: Any

    @classmethod
    def empty(cls, batch: int, slots: int, shapes: Sequence[tuple[int, ...]], dtype: Any) -> "KeyValues":
        """An empty cache of `slots` tokens; shapes: each array's shape per token."""
        values = tuple(jnp.zeros((batch, slots, *shape), dtype) for shape in shapes)
        return cls(values, jnp.full((batch, slots), EMPTY, jnp.int32), jnp.zeros(batch, jnp.int32))

    def with_piece(self, values: Sequence[Array], docs: Documents) -> "KeyValues":
        """The cache with the arrays (b, t, …) of a piece appended. Raises ValueError if the piece has more tokens than
        the cache."""
        segments_bt = docs.segments_bt
        (_, slots), (_, tokens) = self.segments_bs.shape, segments_bt.shape
        if tokens > slots:
            raise ValueError(f"a piece of {tokens} tokens for a cache of {slots}: expected at most {slots}")
        slot_bt = self.index(tokens)
        write = jax.vmap(lambda old, new, slot_t: old.at[slot_t].set(new.astype(old.dtype), mode="drop"))
        written = (write(old, new, slot_bt) for old, new in zip(self.values, values, strict=True))
        segments_bs = write(self.segments_bs, segments_bt, slot_bt)
        return KeyValues(tuple(written), segments_bs, self.length_b + segments_bt.shape[1])

    def reading(self, docs: Documents) -> "Reading":
        """How the queries of the last piece, which the cache contains, read it."""
        tokens = docs.segments_bt.shape[1]
        return Reading(self.values, self.segments_bs, self.index(tokens) - tokens)

    def index(self, tokens: int) -> Array:
        """(b, t) int32: the positions in the sequence of the next `tokens` tokens."""
        return self.length_b[:, None] + jnp.arange(tokens, dtype=jnp.int32)


class Reading(NamedTuple):
    """What queries (b, t) read: values (b, s, …), the documents of these (b, s), and the positions of queries (b, t)
    and of values (b, s), int32. k_index None: the values' positions are 0, 1, …"""

    values: tuple[Array, ...]
    kv_segments_bs: Array
    q_index: Array
    k_index: Array | None = None


class Recurrent(NamedTuple):
    """What a state-space mixer needs of earlier tokens; its size does not grow with their number.

    windows: the last inputs (b, k, c) of each convolution, oldest first; state: the SSM's state after the last token,
    float32; segments_bk: the documents of the window's tokens, at least of the last one, EMPTY before the first.
    """

    windows: Any  # typed for arrays and for their logical axes
    state: Any
    segments_bk: Any

    @classmethod
    def empty(cls, batch: int, taps: int, channels: Sequence[int], state: tuple[int, ...], dtype: Any) -> "Recurrent":
        """The cache before the first token; arguments as in `Rows.recurrent`."""
        windows = tuple(jnp.zeros((batch, taps - 1, size), dtype) for size in channels)
        segments_bk = jnp.full((batch, max(taps - 1, 1)), EMPTY, jnp.int32)
        return cls(windows, jnp.zeros((batch, *state), jnp.float32), segments_bk)

    def emptied(self) -> "Recurrent":
        """A cache of the same shapes, before the first token."""
        windows, state = jax.tree.map(jnp.zeros_like, (self.windows, self.state))
        return Recurrent(windows, state, jax.tree.map(lambda a: jnp.full_like(a, EMPTY), self.segments_bk))

    def halos(self, before: int, docs: Documents) -> list[tuple[Array, Array]]:
        """For each convolution, the inputs (b, before, c) of the tokens before a piece, oldest first, and the documents
        (b, before) of these tokens."""
        return [(window_bkc[:, -before:], self.segments_bk[:, -before:]) for window_bkc in self.windows]

    def entering(self, docs: Documents) -> Array:
        """The state that a piece begins with: zero in rows whose first token is of another document."""
        continues_b = self.segments_bk[:, -1] == docs.segments_bt[:, 0]
        return jnp.where(continues_b.reshape(-1, *(1,) * (self.state.ndim - 1)), self.state, 0)

    def ssd(self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any) -> tuple[Array, Array]:
        """`kernels.ssd` of a piece, continuing the tokens before it: outputs, and the state after the piece."""
        return ssd(*operands, segments_bt=docs.segments_bt, initial_state_bhpn=self.entering(docs), **settings)

    def selective_scan(
        self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any
    ) -> tuple[Array, Array]:
        """`kernels.selective_scan`, likewise."""
        start_bin = self.entering(docs)
        return selective_scan(*operands, segments_bt=docs.segments_bt, initial_state_bin=start_bin, **settings)

    def renamed(self, first_b: Array, continues_b: Array) -> "Recurrent":
        """The cache before a piece that numbers its documents anew: the last document gets the id `first_b` in rows
        whose piece continues it; all others are forgotten."""
        same_bk = (self.segments_bk == self.segments_bk[..., -1:]) & continues_b[:, None]
        return self._replace(segments_bk=jnp.where(same_bk, first_b[:, None], EMPTY))

    def with_piece(self, inputs: Sequence[Array], state: Any, docs: Documents) -> "Recurrent":
        """The cache after a piece whose convolutions read `inputs` (b, t, c), and which left `state`."""
        windows = tuple(_last(window, x) for window, x in zip(self.windows, inputs, strict=True))
        return Recurrent(windows, state, _last(self.segments_bk, docs.segments_bt))


class Rows(NamedTuple):
    """Allocates the plain form of every cache: `batch` rows of at most `length` tokens, which may hold several
    documents and padding."""

    batch: int
    length: int

    def key_values(self, shapes: Sequence[tuple[int, ...]], dtype: Any, *, window: int | None = None) -> KeyValues:
        """The cache of attention that reads arrays of these shapes per token. It keeps all tokens, even those outside a
        `window`."""
        return KeyValues.empty(self.batch, self.length, shapes, dtype)

    def key_value_axes(self, axes: Sequence[tuple[str | None, ...]], *, window: int | None = None) -> KeyValues:
        """The logical axes of `key_values`, from those of each array's shape per token."""
        return KeyValues(tuple(("batch", None, *each) for each in axes), ("batch", None), ("batch",))

    def recurrent(
        self, taps: int, channels: Sequence[int], state: tuple[int, ...], inputs: Sequence[tuple[int, ...]], dtype: Any
    ) -> Recurrent:
        """The cache of a state-space mixer. taps: of its convolutions; channels: of each of them; state: the shape of
        one row's state; inputs: the shapes of a token's x, B and dt, for allocators that keep them; dtype: of the
        windows."""
        return Recurrent.empty(self.batch, taps, channels, state, dtype)

    def recurrent_axes(
        self,
        channels: Sequence[str | None],
        state: tuple[str | None, ...],
        inputs: Sequence[tuple[str | None, ...]],
    ) -> Recurrent:
        """The logical axes of `recurrent`, from those of the channels, of a state and of a token's inputs."""
        return Recurrent(tuple(("batch", None, axis) for axis in channels), ("batch", *state), ("batch", None))


def is_cache(one: Any) -> bool:
    """Whether `one`, which a layer kept, is a cache, to be given with the next piece: only caches have `with_piece`."""
    return hasattr(type(one), "with_piece")


def caches(kept: Any) -> Any:
    """The caches among what a stack's layers kept: what the next piece is given."""
    return map_layers(lambda one: one if is_cache(one) else None, kept)


def without_caches(kept: Any) -> Any:
    """What a stack's layers kept besides caches: statistics."""
    return map_layers(lambda one: None if is_cache(one) else one, kept)


def both(one: Any, other: Any) -> Any:
    """Two trees for a stack's layers, merged; a layer has an entry in at most one of them."""
    return map_layers(lambda a, b: b if a is None else a, one, other) if one and other else one or other


def map_layers(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` of each layer's entries in the trees: only the children of stacks and repetitions are plain tuples."""
    if type(trees[0]) is tuple:
        return tuple(map_layers(function, *children) for children in zip(*trees, strict=True))
    return function(*trees)


def require_one_context_rank(plan: Plan, given: Any) -> None:
    """Raises ValueError if a cache from `Rows` is given while the sequence is split over several ranks of `context`."""
    if isinstance(given, (KeyValues, Recurrent)) and plan.size("context") > 1:
        raise ValueError(f"context={plan.size('context')} with caches of earlier tokens: expected context=1")


def _last(window_bk: Array, x_bt: Array) -> Array:
    """The last tokens of the window followed by `x_bt`, as many as the window has."""
    joined = jnp.concatenate([window_bk, x_bt.astype(window_bk.dtype)], axis=1)
    return joined[:, joined.shape[1] - window_bk.shape[1] :]
