"""What slots carry from call to call on the devices, and what the host tells of them with each call.

A call that reads the end of a prompt enters its slot in the state, and a call that decodes goes on from there. So the
host need not know what one call has chosen when it dispatches the next.

Letters: b slots, r rows that are read, n drafts, e ids that end a text, p pages of a row.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.infer.budget import Thought
from orogen.infer.forward import NONE, Control, Pieces
from orogen.infer.knobs import Features, knobs_of
from orogen.infer.sampling import History, history_of

MOST_ENDS = 16  # ids that end a text which the devices know; the host looks for further ones
BEYOND = 2**30  # a row that no cache has
# Whether a slot decodes, and whether it may have drafts: a grammar must see a token before it allows the next.
OFF, ON, UNDRAFTED = 0, 1, 2


class State(NamedTuple):
    """Of slots that have read their prompts; see `Control`. drafts_bn: None without drafts, since jax 0.11.2 crashes as
    it compiles a `shard_map` of an array without elements. history: all of it that a program of any kind needs."""

    token_b: Any
    place_b: Any
    left_b: Any
    drafts_bn: Any
    history: History


class Seats(NamedTuple):
    """What the host tells of each slot for decoding, int32: OFF, ON or UNDRAFTED; ids that end its text; settings."""

    runs_b: Any
    ends_be: Any
    knobs: Any


class Entries(NamedTuple):
    """What the host tells of rows that are read, int32. slot_r: in its rank; BEYOND: no slot. next_r, start_r, count_r:
    see `Pieces`. left_r: tokens that may come after the first. thought: before it, None without the feature."""

    slot_r: Any
    next_r: Any
    start_r: Any
    count_r: Any
    left_r: Any
    ends_re: Any
    thought: Thought | None
    knobs: Any

    def pieces(self, tokens_rt: Any, table_rp: Any) -> Pieces:
        """The pieces that these rows read."""
        return Pieces(tokens_rt, self.next_r, self.start_r, self.count_r, table_rp)

    def of_share(self, number: Any, slots: int) -> "Entries":
        """The same for one share of a data rank's slots, of which it has so many."""
        slot_r = self.slot_r - number * slots
        return self._replace(slot_r=jnp.where((slot_r >= 0) & (slot_r < slots), slot_r, BEYOND))


def no_seats(count: int, features: Features) -> Seats:
    """Of slots without requests, as numpy arrays."""
    nobody = knobs_of([None] * count, features)
    return Seats(np.full(count, OFF, np.int32), np.full((count, MOST_ENDS), NONE, np.int32), nobody)


def no_entries(count: int, features: Features) -> Entries:
    """Of rows that read nothing, as numpy arrays."""
    whole = lambda value: np.full(count, value, np.int32)  # noqa: E731
    thought = Thought(whole(0), whole(0), whole(-1)) if features.budgets else None
    ends_re = np.full((count, MOST_ENDS), NONE, np.int32)
    nobody = knobs_of([None] * count, features)
    return Entries(whole(BEYOND), whole(NONE), whole(0), whole(0), whole(0), ends_re, thought, nobody)


def no_state(slots: int, features: Features, *, vocab_size: int, drafts: int) -> State:
    """Of slots without requests, as numpy arrays. features: all that a program can be asked for."""
    whole = lambda value: np.full(slots, value, np.int32)  # noqa: E731
    history = history_of([None] * slots, dataclasses.replace(features, budgets=False), vocab_size=vocab_size)
    thought = no_entries(slots, features).thought
    drafts_bn = np.full((slots, drafts), NONE, np.int32) if drafts else None
    return State(whole(NONE), whole(0), whole(0), drafts_bn, history._replace(thought=thought))


def entered(
    state: State, entries: Entries, token_r: Array, drafts_rn: Array, *, bad_r: Array, history: History
) -> State:
    """The state after rows were read: with the slots whose prompts end, of which each has one token. bad_r: as in
    `Emitted`. history: after these tokens."""
    ends_r = (entries.next_r == NONE) & (entries.count_r > 0)
    ended_r = jnp.any(token_r[:, None] == entries.ends_re, axis=1) | bad_r
    place_r, left_r = entries.start_r + entries.count_r, jnp.where(ended_r, 0, entries.left_r)
    slot_r = jnp.where(ends_r, entries.slot_r, BEYOND)
    new = State(token_r, place_r, left_r, None if state.drafts_bn is None else drafts_rn, history)
    return jax.tree.map(lambda old_b, new_r: old_b.at[slot_r].set(new_r, mode="drop"), state, new)


def controlled(state: State, seats: Seats, table_bp: Array) -> Control:
    """The slots before a call of decoding."""
    left_b = jnp.where(seats.runs_b != OFF, state.left_b, 0)
    before_bn = jnp.zeros((len(left_b), 0), jnp.int32) if state.drafts_bn is None else state.drafts_bn
    drafts_bn = jnp.where((seats.runs_b == ON)[:, None], before_bn, NONE)
    # Slots that do not decode have no token of the vocabulary, as padding in `Pieces`.
    token_b = jnp.where(left_b > 0, state.token_b, NONE)
    return Control(token_b, jnp.where(left_b > 0, state.place_b, 0), left_b, drafts_bn, seats.ends_be, table_bp)


def history_for(history: History, features: Features) -> History:
    """What a program with these features needs of the history."""
    counts_bv, prompt_bv = (history.counts_bv, history.prompt_bv) if features.penalties else (None, None)
    return History(history.number_b, counts_bv, prompt_bv, history.thought if features.budgets else None)


def carried(state: State, before: Control, after: Control, history: History) -> State:
    """The state after a call of decoding, which changed only the slots that had tokens left before it."""
    kept = {
        name: old if (new := getattr(history, name)) is None else new for name, old in state.history._asdict().items()
    }
    chosen = lambda new, old: jnp.where(jnp.expand_dims(before.left_b > 0, range(1, new.ndim)), new, old)  # noqa: E731
    return State(
        chosen(after.token_b, state.token_b),
        chosen(after.place_b, state.place_b),
        chosen(after.left_b, state.left_b),
        None if state.drafts_bn is None else chosen(after.drafts_bn, state.drafts_bn),
        History(**kept),
    )
