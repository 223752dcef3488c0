"""What layers keep of earlier tokens, so that a sequence may come in pieces, the last of them single tokens.

A mixer makes its own by `start` in the form that a room gives them (`Rows` here; `Slots`, for an engine, in
`model.slots`), and names their logical axes by `cache_axes`, in the same form.

Pieces follow one another: the documents of a piece are those of the whole row at its places, with ids that no other
document of the row has. The whole row at once and any pieces of it give the same outputs and gradients up to rounding,
where experts drop no token: a capacity is of a piece. Where `tensor` does not divide a piece's tokens, as those of
single ones, the plan is `Plan.decoding()`, which splits rows instead. On a mesh a loop of jax over pieces needs what
`start` makes as varying as what is kept (`parallel.varying.vary_like`).

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

# The segment of what was never written; no document has it.
EMPTY = -1


class KeyValues(NamedTuple):
    """What attention reads of earlier tokens, in the order in which they came.

    values: arrays (b, s, …), keys and values or what they are computed from; segments_bs: the document of each slot,
    int32, EMPTY after the last token; length_b: the tokens of each row so far, int32. Rows may be of different ages.
    What comes after the last slot is lost, and outputs are wrong from there on: whoever chooses the slots counts the
    tokens.
    """

    values: Any  # typed for arrays and for their logical axes
    segments_bs: Any
    length_b: Any

    @classmethod
    def empty(cls, batch: int, slots: int, shapes: Sequence[tuple[int, ...]], dtype: Any) -> "KeyValues":
        """Room for `slots` tokens, of each array of this shape a token."""
        values = tuple(jnp.zeros((batch, slots, *shape), dtype) for shape in shapes)
        return cls(values, jnp.full((batch, slots), EMPTY, jnp.int32), jnp.zeros(batch, jnp.int32))

    def with_piece(self, values: Sequence[Array], docs: Documents) -> "KeyValues":
        """With the arrays (b, t, …) of a piece after what is here. Raises ValueError if it never fits."""
        segments_bt = docs.segments_bt
        (_, slots), (_, tokens) = self.segments_bs.shape, segments_bt.shape
        if tokens > slots:
            raise ValueError(f"a piece of {tokens} tokens for a cache of {slots}: expected at most as many")
        slot_bt = self.index(tokens)
        write = jax.vmap(lambda old, new, slot_t: old.at[slot_t].set(new.astype(old.dtype), mode="drop"))
        written = (write(old, new, slot_bt) for old, new in zip(self.values, values, strict=True))
        segments_bs = write(self.segments_bs, segments_bt, slot_bt)
        return KeyValues(tuple(written), segments_bs, self.length_b + segments_bt.shape[1])

    def reading(self, docs: Documents) -> "Reading":
        """How the queries of the last piece, which is here, read it."""
        tokens = docs.segments_bt.shape[1]
        return Reading(self.values, self.segments_bs, self.index(tokens) - tokens)

    def index(self, tokens: int) -> Array:
        """(b, t) int32: the places in the sequence of the `tokens` to come."""
        return self.length_b[:, None] + jnp.arange(tokens, dtype=jnp.int32)


class Reading(NamedTuple):
    """What queries (b, t) read: values (b, s, …), their documents (b, s), the queries' places (b, t) and the values'
    (b, s), None if they are 0, 1, ..."""

    values: tuple[Array, ...]
    kv_segments_bs: Array
    q_index: Array
    k_index: Array | None = None


class Recurrent(NamedTuple):
    """What a state-space mixer needs of earlier tokens: it does not grow with them.

    windows: of each convolution the last inputs (b, k, c), oldest first; state: the SSM's after the last token,
    float32; segments_bk: the documents of the window's tokens, at least of the last one, EMPTY before the first.
    """

    windows: Any  # typed for arrays and for their logical axes
    state: Any
    segments_bk: Any

    @classmethod
    def empty(cls, batch: int, taps: int, channels: Sequence[int], state: tuple[int, ...], dtype: Any) -> "Recurrent":
        """Before the first token, for convolutions of `taps` taps over so many channels and states of this shape."""
        windows = tuple(jnp.zeros((batch, taps - 1, size), dtype) for size in channels)
        segments_bk = jnp.full((batch, max(taps - 1, 1)), EMPTY, jnp.int32)
        return cls(windows, jnp.zeros((batch, *state), jnp.float32), segments_bk)

    def emptied(self) -> "Recurrent":
        """Of the same shapes, before the first token."""
        windows, state = jax.tree.map(jnp.zeros_like, (self.windows, self.state))
        return Recurrent(windows, state, jax.tree.map(lambda a: jnp.full_like(a, EMPTY), self.segments_bk))

    def window_segments(self, docs: Documents) -> Array:
        """The documents (b, k) of the windows' tokens."""
        return self.segments_bk

    def entering(self, docs: Documents) -> Array:
        """The state that a piece begins with: zero in rows whose first token is of another document."""
        continues_b = self.segments_bk[:, -1] == docs.segments_bt[:, 0]
        return jnp.where(continues_b.reshape(-1, *(1,) * (self.state.ndim - 1)), self.state, 0)

    def ssd(self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any) -> tuple[Array, Array]:
        """`kernels.ssd` of a piece's operands after the tokens before it: outputs, and the state after the piece."""
        return ssd(*operands, segments_bt=docs.segments_bt, initial_state_bhpn=self.entering(docs), **settings)

    def selective_scan(
        self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any
    ) -> tuple[Array, Array]:
        """`kernels.selective_scan` in the same way."""
        start_bin = self.entering(docs)
        return selective_scan(*operands, segments_bt=docs.segments_bt, initial_state_bin=start_bin, **settings)

    def renamed(self, first_b: Array, continues_b: Array) -> "Recurrent":
        """Before a piece whose ids are its own: the last document is `first_b` where the piece goes on with it, and no
        earlier one is known."""
        same_bk = (self.segments_bk == self.segments_bk[..., -1:]) & continues_b[:, None]
        return self._replace(segments_bk=jnp.where(same_bk, first_b[:, None], EMPTY))

    def with_piece(self, inputs: Sequence[Array], state: Any, docs: Documents) -> "Recurrent":
        """After a piece whose convolutions read `inputs` (b, t, c), and which left `state`."""
        windows = tuple(_last(window, x) for window, x in zip(self.windows, inputs, strict=True))
        return Recurrent(windows, state, _last(self.segments_bk, docs.segments_bt))


class Rows(NamedTuple):
    """Room for `batch` rows of at most `length` tokens, which may hold several documents and padding: the plain form of
    every cache."""

    batch: int
    length: int

    def key_values(self, shapes: Sequence[tuple[int, ...]], dtype: Any, *, window: int | None = None) -> KeyValues:
        """For attention that reads arrays of these shapes a token. All tokens stay, also those outside a `window`."""
        return KeyValues.empty(self.batch, self.length, shapes, dtype)

    def key_value_axes(self, axes: Sequence[tuple[str | None, ...]], *, window: int | None = None) -> KeyValues:
        """The logical axes of `key_values`, from those of each array's shape a token."""
        return KeyValues(tuple(("batch", None, *each) for each in axes), ("batch", None), ("batch",))

    def recurrent(
        self, taps: int, channels: Sequence[int], state: tuple[int, ...], inputs: Sequence[tuple[int, ...]], dtype: Any
    ) -> Recurrent:
        """For convolutions of `taps` taps over so many channels and states of this shape. inputs: the shapes of a
        token's x, B and dt, for rooms that keep them."""
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
    """Whether the next piece is given this, which a layer kept: caches take pieces."""
    return hasattr(type(one), "with_piece")


def caches(kept: Any) -> Any:
    """What the next piece is given, among what a stack's layers kept."""
    return map_layers(lambda one: one if is_cache(one) else None, kept)


def without_caches(kept: Any) -> Any:
    """What a stack's layers kept beside caches: statistics."""
    return map_layers(lambda one: None if is_cache(one) else one, kept)


def both(one: Any, other: Any) -> Any:
    """What two trees give to a stack's layers, of which each layer finds something in one at most."""
    return map_layers(lambda a, b: b if a is None else a, one, other) if one and other else one or other


def map_layers(function: Callable[..., Any], *trees: Any) -> Any:
    """The function of what stands for each layer: children of stacks and repetitions are plain tuples, nothing else."""
    if type(trees[0]) is tuple:
        return tuple(map_layers(function, *children) for children in zip(*trees, strict=True))
    return function(*trees)


def require_one_context_rank(plan: Plan, given: Any) -> None:
    """Raises ValueError if what is given belongs to a sequence on several ranks of `context`."""
    if given is not None and plan.size("context") > 1:
        raise ValueError(f"context={plan.size('context')} with caches of earlier tokens: expected context=1")


def _last(window_bk: Array, x_bt: Array) -> Array:
    """The last tokens of the window followed by `x_bt`, as many as the window has."""
    joined = jnp.concatenate([window_bk, x_bt.astype(window_bk.dtype)], axis=1)
    return joined[:, joined.shape[1] - window_bk.shape[1] :]
