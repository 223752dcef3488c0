"""Caches of an engine's slots: of rows that hold one sequence each, come and go, and advance by different counts.

A piece is right-padded: of its `t` tokens row i has the first few, of segment 1, and the rest, of segment 0, leaves no
trace; a row may have none. Its tokens' places are `Documents.positions_bt`, which count on from those before. Keys and
values lie in pages that several rows may share (arXiv:2309.06180), or, under a window, in a ring; the caches hold no
lengths, so a token is taken back by feeding another one at its place. States are taken back by `rolled_back`, as many
tokens as `Slots.drafts` says.

Letters: b rows, t time of a piece, p pages of a row, s places that are read, k tokens of a convolution's window, r
places of a ring, l tokens whose inputs are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.kernels.selective_scan import selective_scan
from orogen.kernels.ssd import ssd
from orogen.layers.documents import Documents
from orogen.model.cache import EMPTY, Reading, map_layers
from orogen.parallel.plan import Plan

# x, dt, B, C and the state before them -> outputs, and the state after them.
Scan = Callable[[Array, Array, Array, Array, Array], tuple[Array, Array]]


class Slots(NamedTuple):
    """Room for the sequences of `rows` slots on this device, in `pages` pages of `page` tokens, at most `reach` pages a
    row; see `cache.Rows`.

    piece: the most tokens that a piece has. drafts: the most tokens that are taken back. replay: how many tokens whose
    inputs are kept beside a state (see `Replayed`), at least 2 (drafts + 1) where there are drafts; 0: none.
    """

    rows: int
    pages: int
    page: int
    reach: int
    piece: int
    drafts: int = 0
    replay: int = 0

    def key_values(self, shapes: Sequence[tuple[int, ...]], dtype: Any, *, window: int | None = None) -> Any:
        """`Paged`, or `Ringed` for a window."""
        if window is not None:
            return Ringed(tuple(jnp.zeros((self.rows, window + self.piece, *shape), dtype) for shape in shapes))
        values = tuple(jnp.zeros((self.pages, self.page, *shape), dtype) for shape in shapes)
        return Paged(values, jnp.zeros((self.rows, self.reach), jnp.int32))

    def key_value_axes(self, axes: Sequence[tuple[str | None, ...]], *, window: int | None = None) -> Any:
        """The logical axes of `key_values`. Pages are those of a data rank, which numbers them from 0."""
        values = tuple(("batch", None, *each) for each in axes)
        return Paged(values, ("batch", None)) if window is None else Ringed(values)

    def recurrent(
        self, taps: int, channels: Sequence[int], state: tuple[int, ...], inputs: Sequence[tuple[int, ...]], dtype: Any
    ) -> "SlotState":
        """`SlotState` for convolutions of `taps` taps over so many channels and states of this shape; see
        `cache.Rows.recurrent`."""
        tokens = taps - 1 + self.drafts
        windows = tuple(jnp.zeros((self.rows, tokens, size), dtype) for size in channels)
        zeros = jnp.zeros((self.rows, *state), jnp.float32)
        if not self.replay:
            return SlotState(windows, zeros)
        x, dt, B = (
            jnp.zeros((self.rows, self.replay, *shape), kind)
            for shape, kind in zip(inputs, (dtype, jnp.float32, dtype), strict=True)
        )
        return SlotState(windows, Replayed(zeros, x, dt, B, jnp.zeros(self.rows, jnp.int32)))

    def recurrent_axes(
        self,
        channels: Sequence[str | None],
        state: tuple[str | None, ...],
        inputs: Sequence[tuple[str | None, ...]],
    ) -> "SlotState":
        """The logical axes of `recurrent`."""
        windows, named = tuple(("batch", None, axis) for axis in channels), ("batch", *state)
        if not self.replay:
            return SlotState(windows, named)
        return SlotState(windows, Replayed(named, *(("batch", None, *each) for each in inputs), ("batch",)))


class Paged(NamedTuple):
    """Keys and values (pages, page, …), or what they are computed from, and the pages of each row (b, p) int32, in the
    order of its tokens. No two rows write one page."""

    values: Any  # typed for arrays and for their logical axes
    table_bp: Any

    def with_piece(self, values: Sequence[Array], docs: Documents) -> "Paged":
        """With the arrays (b, t, …) of a piece at its places."""
        pages, page = self.values[0].shape[:2]
        index_bt = jnp.take_along_axis(self.table_bp, docs.positions_bt // page, axis=1, mode="clip")
        index_bt = jnp.where(docs.segments_bt != 0, index_bt * page + docs.positions_bt % page, pages * page)

        def write(pool: Array, new: Array) -> Array:
            flat = pool.reshape(-1, *pool.shape[2:])
            flat = flat.at[index_bt.reshape(-1)].set(_flat(new).astype(pool.dtype), mode="drop")
            return flat.reshape(pool.shape)

        return self._replace(values=tuple(map(write, self.values, values)))

    def reading(self, docs: Documents) -> Reading:
        """Every place of the rows' pages: those after a query are those that causality hides."""
        read = tuple(pool[self.table_bp].reshape(len(self.table_bp), -1, *pool.shape[2:]) for pool in self.values)
        return Reading(read, jnp.ones(read[0].shape[:2], jnp.int32), docs.positions_bt)


class Ringed(NamedTuple):
    """Keys and values (b, r, …) of the last tokens: place i is at i modulo r. The ring is longer than a window by a
    piece, so that a piece, and what is fed again in place of its end, overwrites nothing that a window reaches."""

    values: Any

    def with_piece(self, values: Sequence[Array], docs: Documents) -> "Ringed":
        """With the arrays (b, t, …) of a piece at its places."""
        places = self.values[0].shape[1]
        index_bt = jnp.where(docs.segments_bt != 0, docs.positions_bt % places, places)
        write = jax.vmap(lambda ring, new, index_t: ring.at[index_t].set(new.astype(ring.dtype), mode="drop"))
        return Ringed(tuple(write(ring, new, index_bt) for ring, new in zip(self.values, values, strict=True)))

    def reading(self, docs: Documents) -> Reading:
        """The last places up to the piece's last token."""
        places = self.values[0].shape[1]
        last_b1 = docs.positions_bt[:, :1] + _counts(docs)[:, None] - 1
        place_bs = last_b1 - (last_b1 - jnp.arange(places)) % places
        return Reading(self.values, jnp.where(place_bs >= 0, 1, EMPTY), docs.positions_bt, place_bs)


class Replayed(NamedTuple):
    """A state as it was some tokens ago, float32, and the inputs of the tokens since: x and B in the dtype of
    activations, dt float32, (b, l, …), of which each row has `count_b`, int32. (ReplaySSM)

    A token's output is computed from these; the state moves only when the next tokens would not fit, that of all rows
    at once, so that it is read with each token but seldom written. A token is taken back by counting less.
    """

    state: Any
    x: Any
    dt: Any
    B: Any
    count_b: Any

    def after(self, scan: Scan, inputs: Sequence[Array], docs: Documents) -> tuple[Array, "Replayed"]:
        """The outputs (b, t, …) of a piece whose x, dt, B and C are `inputs`, and the state after it."""
        x, dt, B, C = inputs
        tokens, room, counts_b = x.shape[1], self.x.shape[1], _counts(docs)
        if 2 * tokens > room:  # a piece of a prompt
            y, state = scan(x, dt, B, C, self.moved(scan).state)
            return y, self._replace(state=state, count_b=jnp.zeros_like(counts_b))
        ring = lax.cond(jnp.any(self.count_b + tokens > room), lambda r: r.moved(scan), lambda r: r, self)
        index_bt = ring.count_b[:, None] + jnp.arange(tokens)
        write = jax.vmap(lambda old, new, index_t: old.at[index_t].set(new.astype(old.dtype)))
        ring = ring._replace(**{n: write(getattr(ring, n), a, index_bt) for n, a in (("x", x), ("dt", dt), ("B", B))})
        C_bl = write(jnp.zeros((*C.shape[:1], room, *C.shape[2:]), C.dtype), C, index_bt)
        # Inputs beyond a row's last token are left over from others; they come after all that is read.
        y_bl, _ = scan(ring.x, ring.dt, ring.B, C_bl, ring.state)
        y = jax.vmap(lambda y_l, index_t: y_l[index_t])(y_bl, index_bt)
        return y, ring._replace(count_b=ring.count_b + counts_b)

    def moved(self, scan: Scan) -> "Replayed":
        """The state after all tokens, and no inputs beside it."""
        here_bl = jnp.arange(self.dt.shape[1]) < self.count_b[:, None]
        dt = jnp.where(here_bl[..., None], self.dt, 0)
        _, state = scan(self.x, dt, self.B, jnp.zeros_like(self.B), self.state)
        return self._replace(state=state, count_b=jnp.zeros_like(self.count_b))


class SlotState(NamedTuple):
    """What a state-space mixer needs of earlier tokens: of each convolution the last inputs (b, k, c), oldest first,
    and the SSM's state, float32, or what it is computed from."""

    windows: Any
    state: Any

    def window_segments(self, docs: Documents) -> Array:
        """1, as a piece's tokens: before the first token windows are zero, as is what a convolution reads there."""
        return jnp.ones((len(docs.segments_bt), self.windows[0].shape[1]), jnp.int32)

    def ssd(self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any) -> tuple[Array, Any]:
        """`kernels.ssd` of a piece's operands after the tokens before it: outputs, and the state after its last token.
        Padding takes a step of no time, after which the state is what it was."""
        a_h = operands[2]

        def scan(x: Array, dt: Array, B: Array, C: Array, state: Array) -> tuple[Array, Array]:
            return ssd(x, dt, a_h, B, C, initial_state_bhpn=state, **settings)

        return self._after(scan, operands, docs)

    def selective_scan(
        self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any
    ) -> tuple[Array, Array]:
        """`kernels.selective_scan` in the same way."""
        A_in = operands[2]

        def scan(x: Array, dt: Array, B: Array, C: Array, state: Array) -> tuple[Array, Array]:
            return selective_scan(x, dt, A_in, B, C, initial_state_bin=state, **settings)

        return self._after(scan, operands, docs)

    def _after(self, scan: Scan, operands: Sequence[Array], docs: Documents) -> tuple[Array, Any]:
        x, dt, _, B, C = operands
        dt = jnp.where(docs.segments_bt[..., None] != 0, dt, 0)
        if isinstance(self.state, Replayed):
            return self.state.after(scan, (x, dt, B, C), docs)
        return scan(x, dt, B, C, self.state)

    def with_piece(self, inputs: Sequence[Array], state: Any, docs: Documents) -> "SlotState":
        """After a piece whose convolutions read `inputs` (b, t, c), and which left `state`."""
        count_b = _counts(docs)
        windows = tuple(
            _rows_from(jnp.concatenate([window, new.astype(window.dtype)], 1), count_b, window.shape[1])
            for window, new in zip(self.windows, inputs, strict=True)
        )
        return SlotState(windows, state)

    def rolled_back(self, count_b: Array) -> "SlotState":
        """Without each row's last `count_b` tokens. What comes to stand in front of a window is never read."""

        def back(window: Array) -> Array:
            tokens = window.shape[-2]
            index_bk = jnp.maximum(jnp.arange(tokens) - count_b[:, None], 0)
            index = index_bk.reshape(*(1,) * (window.ndim - 3), *index_bk.shape, 1)
            return jnp.take_along_axis(window, index, axis=-2)

        state = self.state
        if isinstance(state, Replayed):
            state = state._replace(count_b=state.count_b - count_b)
        return SlotState(jax.tree.map(back, self.windows), state)


def with_tables(caches: Any, table_bp: Array) -> Any:
    """The caches of a stack's layers whose rows have these pages."""

    def place(one: Any) -> Any:
        if not isinstance(one, Paged):
            return one
        stacked = one.table_bp.shape[:-2]
        return one._replace(table_bp=jnp.broadcast_to(table_bp, (*stacked, *table_bp.shape)))

    return map_layers(place, caches)


def rolled_back(caches: Any, count_b: Array) -> Any:
    """The caches without each row's last `count_b` tokens, at most `Slots.drafts`."""

    def take_back(one: Any) -> Any:
        return one.rolled_back(count_b) if isinstance(one, SlotState) else one

    return map_layers(take_back, caches)


def without_drafts(known: Any, tentative: Any) -> Any:
    """The caches of `tentative`, which has read drafts after what `known` has, without them: pages and rings keep what
    will be overwritten, and states are those of `known`."""
    return map_layers(lambda a, b: a if isinstance(a, SlotState) else b, known, tentative)


def _counts(docs: Documents) -> Array:
    """(b,) how many tokens of a piece each row has."""
    return jnp.sum(docs.segments_bt != 0, axis=1, dtype=jnp.int32)


def _rows_from(x_btc: Array, start_b: Array, length: int) -> Array:
    """(b, length, c): of each row what begins at its own start."""
    index_bk = start_b[:, None] + jnp.arange(length)
    return jnp.take_along_axis(x_btc, index_bk[..., None], axis=1, mode="clip")


def _flat(x: Array) -> Array:
    """(b, t, …) as (b · t, …)."""
    return x.reshape(-1, *x.shape[2:])
