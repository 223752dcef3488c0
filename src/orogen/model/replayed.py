"""States rebuilt from the inputs of the last tokens (ReplaySSM); see `kernels.replay`. Letters: b rows, t time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from orogen.layers.documents import Documents
from orogen.model.stored_state import Run, updated


class Replayed(NamedTuple):
    """A state as it was some tokens ago (`stored_state`), and a ring with the inputs of the tokens since then: each row
    has `cursor_b` of them, int32; see `kernels.replay`.

    A row's state is updated only when its next tokens would not fit into the ring, so states are read for every token
    but rarely written. Tokens are rolled back by moving the cursor.
    """

    state: Any
    ring: Any
    cursor_b: Any

    def moved(self, run: Run, flush_b: Array, seeds_b2: Array | None) -> "Replayed":
        """With the ring's inputs applied to the states of the rows in `flush_b`. run: (state, seeds) -> new state, new
        cursors, as `kernels.replay.flush` computes them."""

        def flushed(state: Array, seeds_b2: Array | None) -> tuple[Array, Array]:
            state, cursor_b = run(state, seeds_b2)
            return cursor_b, state

        rows_b = flush_b & (self.cursor_b > 0)
        cursor_b, state = updated(self.state, flushed, seeds_b2=seeds_b2, rows_b=rows_b)
        return Replayed(state, self.ring, cursor_b)


class Replays(NamedTuple):
    """What a mixer does with `Replayed`.

    move: (replayed, rows (b,) bool) -> replayed, with the ring's inputs applied to the states of these rows.
    play: replayed -> a piece's outputs, and the ring with the piece.
    scan: state -> a piece's outputs, and the state after it, computed with an empty ring.
    """

    move: Callable[[Replayed, Array], Replayed]
    play: Callable[[Replayed], tuple[Array, Any]]
    scan: Callable[[Any], tuple[Array, Any]]


def after(kept: Replayed, docs: Documents, replays: Replays, *, cheap: bool, alone: bool) -> tuple[Array, Replayed]:
    """The outputs of a piece, and what is kept. cheap: whether moving no row costs nothing. alone: whether this rank
    has the whole piece; parts of a piece do not enter the ring."""
    tokens, entries = docs.segments_bt.shape[1], kept.ring[0].shape[1]
    every_b = jnp.ones(kept.cursor_b.shape, bool)
    if 2 * tokens > entries or not alone:  # a piece of a prompt
        kept = replays.move(kept, every_b)
        y, state = replays.scan(kept.state)
        return y, kept._replace(state=state)
    full_b = kept.cursor_b + tokens > entries  # each row by itself: when it moves does not depend on other rows
    if cheap:
        kept = replays.move(kept, full_b)
    else:
        kept = lax.cond(jnp.any(full_b), lambda k: replays.move(k, full_b), lambda k: k, kept)
    y, ring = replays.play(kept)
    return y, Replayed(kept.state, ring, kept.cursor_b + counts(docs))


def counts(docs: Documents) -> Array:
    """(b,) int32: the number of tokens that each row has in a piece."""
    return jnp.sum(docs.segments_bt != 0, axis=1, dtype=jnp.int32)
