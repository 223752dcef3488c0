"""States rebuilt from the inputs of the last tokens (ReplaySSM); see `kernels.replay`. Letters: b rows, t time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from orogen.layers.documents import Documents


class Replayed(NamedTuple):
    """A state as it was some tokens ago, float32, and the inputs of the tokens since, of which each row has `cursor_b`,
    int32; see `kernels.replay`.

    The states of all rows move at once, when the next tokens would not fit in one of them, so that states are read with
    each token but seldom written. A token is taken back by moving the cursor.
    """

    state: Any
    ring: Any
    cursor_b: Any


class Replays(NamedTuple):
    """What one mixer does with `Replayed`: moves the states of some rows (b,) up to their cursors; computes a piece's
    outputs and the ring with it; or computes a piece from a state that has no inputs beside it."""

    move: Callable[[Replayed, Array], Replayed]
    play: Callable[[Replayed], tuple[Array, Any]]
    scan: Callable[[Array], tuple[Array, Array]]


def after(kept: Replayed, docs: Documents, replays: Replays, *, cheap: bool) -> tuple[Array, Replayed]:
    """The outputs of a piece, and what is kept. cheap: whether a move of no row costs nothing."""
    tokens, places = docs.segments_bt.shape[1], kept.ring[0].shape[1]
    every_b = jnp.ones(kept.cursor_b.shape, bool)
    if 2 * tokens > places:  # a piece of a prompt
        kept = replays.move(kept, every_b)
        y, state = replays.scan(kept.state)
        return y, kept._replace(state=state)
    full = jnp.any(kept.cursor_b + tokens > places)
    if cheap:
        kept = replays.move(kept, every_b & full)
    else:
        kept = lax.cond(full, lambda k: replays.move(k, every_b), lambda k: k, kept)
    y, ring = replays.play(kept)
    return y, Replayed(kept.state, ring, kept.cursor_b + counts(docs))


def counts(docs: Documents) -> Array:
    """(b,) how many tokens of a piece each row has."""
    return jnp.sum(docs.segments_bt != 0, axis=1, dtype=jnp.int32)
