"""Caches of an engine's slots: each row holds one sequence, and rows start, end and advance independently.

A piece is right-padded: the first tokens of a row, perhaps none, have segment 1; the padding has segment 0 and changes
no cache. The tokens' positions are `Documents.positions_bt`, which continue from those before. Keys and values are in
pages that several rows may share (arXiv:2309.06180) or, under a window, in a ring, as are the inputs of convolutions.
These caches hold no lengths, so a token is rolled back by feeding another one at its position; states are rolled back
by `rolled_back`, by up to `Slots.drafts` tokens.

Letters: b rows, t time of a piece, p pages per row, s positions that are read, k tokens of a convolution's window, r
entries of a ring, l tokens whose inputs are kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.kernels.paged_attention import paged_attention
from orogen.kernels.replay import Ring, SelectiveRing, flush, replay, selective_flush, selective_replay
from orogen.kernels.state_update import selective_update, ssm_update
from orogen.kernels.state_update.reference import rounded
from orogen.layers.documents import Documents
from orogen.model.cache import EMPTY, Reading, map_layers
from orogen.model.context_cache import whole_documents
from orogen.model.context_ssm import scan_continued, ssd_continued
from orogen.model.replayed import Replayed, Replays, after, counts
from orogen.model.stored_state import axes, empty, opened, seeds_of, updated
from orogen.parallel.plan import Plan

FEW = 8  # the most tokens of a piece that the decoding kernels are designed for


class Slots(NamedTuple):
    """Allocates the caches of `rows` slots on this device, in `pages` pages of `page` tokens, at most `reach` pages per
    row; see `cache.Rows`.

    piece: the most tokens of a piece. drafts: the most tokens that are rolled back. replay: the number of tokens whose
    inputs are kept beside a state (see `Replayed`), at least 2 (drafts + 1) if there are drafts; 0: none. state_dtype:
    see `stored_state`. cache_dtype: of keys and values; None: that of activations.
    """

    rows: int
    pages: int
    page: int
    reach: int
    piece: int
    drafts: int = 0
    replay: int = 0
    state_dtype: Any = jnp.float32
    cache_dtype: Any = None

    def key_values(self, shapes: Sequence[tuple[int, ...]], dtype: Any, *, window: int | None = None) -> Any:
        """`Paged`, or `Ringed` for a window."""
        dtype = self.cache_dtype or dtype
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
        """`SlotState`; arguments as in `cache.Rows.recurrent`."""
        tokens = taps - 1 + self.drafts
        windows = tuple(jnp.zeros((self.rows, tokens, size), dtype) for size in channels)
        zeros = empty((self.rows, *state), self.state_dtype)
        if not self.replay:
            return SlotState(windows, zeros)
        dtypes = dtype, dtype, jnp.float32
        made = [jnp.zeros((self.rows, self.replay, *s), d) for s, d in zip(inputs, dtypes, strict=True)]
        kind: Any = Ring if len(state) == 3 else SelectiveRing
        return SlotState(windows, Replayed(zeros, kind(*made), jnp.zeros(self.rows, jnp.int32)))

    def recurrent_axes(
        self,
        channels: Sequence[str | None],
        state: tuple[str | None, ...],
        inputs: Sequence[tuple[str | None, ...]],
    ) -> "SlotState":
        """The logical axes of `recurrent`."""
        windows, named = tuple(("batch", None, axis) for axis in channels), axes(("batch", *state), self.state_dtype)
        if not self.replay:
            return SlotState(windows, named)
        kind: Any = Ring if len(state) == 3 else SelectiveRing
        ring = kind(*(("batch", None, *each) for each in inputs))
        return SlotState(windows, Replayed(named, ring, ("batch",)))


class Paged(NamedTuple):
    """Keys and values (pages, page, …), or what they are computed from; and the pages of each row (b, p), int32, in the
    order of its tokens. Rows may share pages that they only read; no two rows write to one page."""

    values: Any  # typed for arrays and for their logical axes
    table_bp: Any

    def with_piece(self, values: Sequence[Array], docs: Documents) -> "Paged":
        """The cache with the arrays (b, t, …) of a piece at its positions."""
        pages, page = self.values[0].shape[:2]
        # A position beyond the table has no page, so nothing is written.
        page_bt = jnp.take_along_axis(self.table_bp, docs.positions_bt // page, axis=1, mode="fill", fill_value=pages)
        index_bt = jnp.where(docs.segments_bt != 0, page_bt * page + docs.positions_bt % page, pages * page)

        def write(pool: Array, new: Array) -> Array:
            flat = pool.reshape(-1, *pool.shape[2:])
            entries = flat.at[index_bt.reshape(-1)]
            flat = entries.set(new.reshape(-1, *new.shape[2:]).astype(pool.dtype), mode="drop")
            return flat.reshape(pool.shape)

        return self._replace(values=tuple(map(write, self.values, values)))

    def attend(
        self, q_bthk: Array, docs: Documents, plan: Plan, *, sinks_h: Array | None, window: int | None, scale: float
    ) -> Array | None:
        """Outputs (b, t, h, k) of a few queries by the kernel that reads pages in place; None for more tokens, under a
        window, or if the plan has no such kernel. Pages in FP8 have the scales of the plan's recipe."""
        dealt = plan.size("context") > 1
        if plan.decode_kernels == "reference" or q_bthk.shape[1] > FEW or window is not None or dealt:
            return None
        count_b, tokens = counts(docs), q_bthk.shape[1]
        # The kernel takes a row's last tokens. Padding therefore moves to the front, and the length ends at the last
        # real token: beyond it may be NaN, which a weight of zero does not hide.
        moved_bt = (jnp.arange(tokens) + count_b[:, None]) % tokens
        back_bt = (jnp.arange(tokens) - count_b[:, None]) % tokens
        turned = lambda a, index_bt: a if tokens == 1 else _at_times(a, index_bt)  # noqa: E731
        length_b = jnp.where(count_b > 0, docs.positions_bt[:, 0] + count_b, 0)
        k_nsgk, v_nsgk = self.values
        y_bthk = paged_attention(
            turned(q_bthk, moved_bt), k_nsgk, v_nsgk, self.table_bp, length_b, sinks_h=sinks_h, scale=scale,
            stored=plan.recipe.stored.key_values, implementation=plan.decode_kernels,
        )  # fmt: skip
        return turned(y_bthk, back_bt)

    def reading(self, docs: Documents) -> Reading:
        """Reads every position of the rows' pages; the causal mask excludes those after a query. Positions beyond a
        row's last token read as zero: another sequence may have left a NaN there, which a weight of zero does not
        hide."""
        rows, page = len(self.table_bp), self.values[0].shape[1]
        last_b1 = docs.positions_bt[:, :1] + counts(docs)[:, None] - 1
        known_bs = jnp.arange(self.table_bp.shape[1] * page) <= last_b1

        def read(pool: Array) -> Array:
            values = pool[self.table_bp].reshape(rows, -1, *pool.shape[2:])
            return jnp.where(jnp.expand_dims(known_bs, range(2, values.ndim)), values, 0)

        return Reading(tuple(map(read, self.values)), jnp.ones(known_bs.shape, jnp.int32), docs.positions_bt)


class Ringed(NamedTuple):
    """Keys and values (b, r, …) of the last tokens: position i is entry i modulo r. The ring is as long as a window and
    a piece, so that neither a piece nor tokens that replace its end overwrite anything inside a window."""

    values: Any

    def with_piece(self, values: Sequence[Array], docs: Documents) -> "Ringed":
        """The cache with the arrays (b, t, …) of a piece at its positions."""
        entries = self.values[0].shape[1]
        index_bt = jnp.where(docs.segments_bt != 0, docs.positions_bt % entries, entries)
        write = jax.vmap(lambda ring, new, index_t: ring.at[index_t].set(new.astype(ring.dtype), mode="drop"))
        return Ringed(tuple(write(ring, new, index_bt) for ring, new in zip(self.values, values, strict=True)))

    def reading(self, docs: Documents) -> Reading:
        """Reads the ring: the last positions up to the piece's last token."""
        entries = self.values[0].shape[1]
        last_b1 = docs.positions_bt[:, :1] + counts(docs)[:, None] - 1
        position_bs = last_b1 - (last_b1 - jnp.arange(entries)) % entries
        return Reading(self.values, jnp.where(position_bs >= 0, 1, EMPTY), docs.positions_bt, position_bs)


class SlotState(NamedTuple):
    """What a state-space mixer needs of earlier tokens: the last inputs (b, k, c) of each convolution, in a ring where
    position i has entry i modulo k; and the SSM's state (`stored_state`), or what it is computed from (`Replayed`)."""

    windows: Any
    state: Any

    def halos(self, before: int, docs: Documents) -> list[tuple[Array, Array]]:
        """The inputs (b, before, c) of each convolution before a piece, oldest first, and their segments: 1, like a
        piece's. Before the first token the inputs are zero, and zero is what a convolution reads there."""
        position_bk = docs.positions_bt[:, :1] - before + jnp.arange(before)
        segments_bk = jnp.ones_like(position_bk)
        return [(_at_positions(window, position_bk), segments_bk) for window in self.windows]

    def ssd(
        self, operands: Sequence[Array], docs: Documents, plan: Plan, *, skip_h: Array, **settings: Any
    ) -> tuple[Array, Any]:
        """`kernels.ssd` of a piece, continuing the tokens before it: outputs, and the state after its last token.
        Padding takes steps of length zero, which leave the state as it is."""
        x_bthp, dt_bth, a_h, B_btgn, C_btgn = operands
        dt_bth, docs = _without_padding(dt_bth, docs), whole_documents(docs, plan)
        kernel, alone = plan.decode_kernels, plan.size("context") == 1
        rounds = {"seeds_b2": self._seeds(a_h, docs, plan), "rows_b": counts(docs) > 0}
        of_rows = {"skip_h": skip_h, "active_b": counts(docs) > 0}

        def scan(state_bhpn: Array, seeds_b2: Array | None) -> tuple[Array, Array]:
            inputs = x_bthp, dt_bth, a_h, B_btgn, C_btgn
            y_bthp, state_bhpn = ssd_continued(inputs, state_bhpn, plan, skip_h=skip_h, **settings)
            return y_bthp, rounded(state_bhpn, seeds_b2)

        if isinstance(self.state, Replayed):

            def move(kept: Replayed, flush_b: Array) -> Replayed:
                def run(state_bhpn: Array, seeds_b2: Array | None) -> tuple[Array, Array]:
                    implementation = "triton" if kernel == "triton" else "recurrence"
                    return flush(kept.ring, a_h, kept.cursor_b, state_bhpn=state_bhpn, flush_b=flush_b,
                                 seeds_b2=seeds_b2, implementation=implementation)  # fmt: skip

                return kept.moved(run, flush_b, rounds["seeds_b2"])

            def play(kept: Replayed) -> tuple[Array, Any]:
                implementation = "triton" if kernel == "triton" else "parallel"
                return replay(
                    Ring(x_bthp, B_btgn, dt_bth), a_h, C_btgn, state_bhpn=opened(kept.state), ring=kept.ring,
                    cursor_b=kept.cursor_b, implementation=implementation, **of_rows,
                )  # fmt: skip

            replays = Replays(move, play, lambda state: updated(state, scan, **rounds))
            return after(self.state, docs, replays, cheap=kernel == "triton", alone=alone)
        if x_bthp.shape[1] > 1:
            return updated(self.state, scan, **rounds)
        one = x_bthp[:, 0], dt_bth[:, 0], a_h, B_btgn[:, 0], C_btgn[:, 0]

        def step(state: Any, seeds_b2: Array | None) -> tuple[Array, Any]:
            return ssm_update(*one, state_bhpn=state, seeds_b2=seeds_b2, **of_rows, implementation=kernel)

        y_bhp, state = updated(self.state, step, **rounds, in_blocks=True)
        return y_bhp[:, None], state

    def selective_scan(
        self, operands: Sequence[Array], docs: Documents, plan: Plan, **settings: Any
    ) -> tuple[Array, Any]:
        """`kernels.selective_scan`, likewise."""
        x_bti, dt_bti, A_in, B_btn, C_btn = operands
        dt_bti, docs = _without_padding(dt_bti, docs), whole_documents(docs, plan)
        active_b, alone = counts(docs) > 0, plan.size("context") == 1
        rounds = {"seeds_b2": self._seeds(A_in, docs, plan), "rows_b": active_b}

        def scan(state_bin: Array, seeds_b2: Array | None) -> tuple[Array, Array]:
            inputs = x_bti, dt_bti, A_in, B_btn, C_btn
            y_bti, state_bin = scan_continued(inputs, state_bin.astype(jnp.float32), plan, **settings)
            return y_bti, rounded(state_bin, seeds_b2)

        if isinstance(self.state, Replayed):

            def move(kept: Replayed, flush_b: Array) -> Replayed:
                def run(state_bin: Array, seeds_b2: Array | None) -> tuple[Array, Array]:
                    return selective_flush(kept.ring, A_in, kept.cursor_b, state_bin=state_bin, flush_b=flush_b,
                                           seeds_b2=seeds_b2)  # fmt: skip

                return kept.moved(run, flush_b, rounds["seeds_b2"])

            def play(kept: Replayed) -> tuple[Array, Any]:
                piece, cached = SelectiveRing(x_bti, B_btn, dt_bti), {"ring": kept.ring, "cursor_b": kept.cursor_b}
                return selective_replay(piece, A_in, C_btn, state_bin=opened(kept.state), active_b=active_b, **cached)

            replays = Replays(move, play, lambda state: updated(state, scan, **rounds))
            return after(self.state, docs, replays, cheap=False, alone=alone)
        if x_bti.shape[1] > 1:
            return updated(self.state, scan, **rounds)
        one = x_bti[:, 0], dt_bti[:, 0], A_in, B_btn[:, 0], C_btn[:, 0]
        kernel = {"active_b": active_b, "implementation": plan.decode_kernels}
        step = lambda state, seeds: selective_update(*one, state_bin=state, seeds_b2=seeds, **kernel)  # noqa: E731
        y_bi, state = updated(self.state, step, **rounds, in_blocks=True)
        return y_bi[:, None], state

    def _seeds(self, rates: Array, docs: Documents, plan: Plan) -> Array | None:
        return seeds_of(self.state.state if isinstance(self.state, Replayed) else self.state, rates, docs, plan)

    def with_piece(self, inputs: Sequence[Array], state: Any, docs: Documents) -> "SlotState":
        """The cache after a piece whose convolutions read `inputs` (b, t, c), and which left `state`."""
        return SlotState(
            tuple(_written(window, new, docs) for window, new in zip(self.windows, inputs, strict=True)), state
        )

    def rolled_back(self, count_b: Array) -> "SlotState":
        """The cache without each row's last `count_b` tokens."""
        if not isinstance(self.state, Replayed):
            return self
        return self._replace(state=self.state._replace(cursor_b=self.state.cursor_b - count_b))


def with_tables(caches: Any, table_bp: Array) -> Any:
    """The caches of a stack's layers with these tables of pages."""

    def place(one: Any) -> Any:
        if not isinstance(one, Paged):
            return one
        return one._replace(table_bp=jnp.broadcast_to(table_bp, (*one.table_bp.shape[:-2], *table_bp.shape)))

    return map_layers(place, caches)


def with_pools(caches: Any, other: Any) -> Any:
    """The caches of a stack's layers with the pages of `other`, and their own tables."""
    pools = lambda old, new: old._replace(values=new.values) if isinstance(old, Paged) else old  # noqa: E731
    return map_layers(pools, caches, other)


def rolled_back(caches: Any, count_b: Array) -> Any:
    """The caches without each row's last `count_b` tokens, at most `Slots.drafts`; the last piece must have had at most
    half as many tokens as `Slots.replay`."""

    def take_back(one: Any) -> Any:
        return one.rolled_back(count_b) if isinstance(one, SlotState) else one

    return map_layers(take_back, caches)


def without_drafts(known: Any, tentative: Any) -> Any:
    """The caches without drafts, given those before the drafts, `known`, and those after, `tentative`. Pages and rings
    keep the drafts' entries, which will be overwritten; states are those of `known`."""
    return map_layers(lambda a, b: a if isinstance(a, SlotState) else b, known, tentative)


def _without_padding(dt: Array, docs: Documents) -> Array:
    """Time steps (b, t, …), 0 for padding."""
    return jnp.where(docs.segments_bt[..., None] != 0, dt, 0)


def _at_positions(ring_bkc: Array, position_bs: Array) -> Array:
    """(b, s, c): a ring's entries for each row's positions."""
    return jnp.take_along_axis(ring_bkc, (position_bs % ring_bkc.shape[1])[..., None], axis=1)


def _written(ring_bkc: Array, new_btc: Array, docs: Documents) -> Array:
    """The ring with a piece's tokens at their positions."""
    tokens, size = new_btc.shape[1], ring_bkc.shape[1]
    start_b1, count_b1 = docs.positions_bt[:, :1], counts(docs)[:, None]
    entry_k, new_btc = jnp.arange(size), new_btc.astype(ring_bkc.dtype)
    if tokens <= FEW:  # with selects alone, which XLA computes in place: it would copy the ring for a gather
        for number in range(tokens):
            here_bk = ((start_b1 + number) % size == entry_k) & (number < count_b1)
            ring_bkc = jnp.where(here_bk[..., None], new_btc[:, number : number + 1], ring_bkc)
        return ring_bkc
    last_b1 = start_b1 + count_b1 - 1
    # The index in the piece of the latest token of each entry; negative if that token came before the piece.
    index_bk = last_b1 - (last_b1 - entry_k) % size - start_b1
    latest_bkc = jnp.take_along_axis(new_btc, jnp.maximum(index_bk, 0)[..., None], axis=1)
    return jnp.where((index_bk >= 0)[..., None], latest_bkc, ring_bkc)


def _at_times(x_bthk: Array, index_bt: Array) -> Array:
    """Each row's tokens in this order."""
    return jnp.take_along_axis(x_bthk, index_bt[..., None, None], axis=1)
