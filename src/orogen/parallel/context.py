"""The sequence over the ranks of `context`: which tokens a rank holds, and what it needs from its neighbours.

With c ranks, a row is split into 2c equal chunks, and rank r holds chunks r and 2c - 1 - r, one after the other (the
zig-zag of causal ring attention, which gives every rank the same number of visible pairs of tokens). So each rank holds
two *parts* of the sequence, which runs up the ranks through their first parts, then down through their second parts.
With one rank there is one part, the row, and nothing here communicates.

Letters: b batch, t time of this rank, s time of the whole sequence, p parts, h heads or channels.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like


def zigzag(length: int, ranks: int) -> np.ndarray:
    """(length,) the positions in the sequence of the tokens of rank 0, then of rank 1, and so on."""
    if ranks == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate([np.concatenate([chunks[r], chunks[-1 - r]]) for r in range(ranks)])


def indices(length: int, plan: Plan, rank: Array | int | None = None) -> Array:
    """(t,) int32: the positions in the sequence of the `length` tokens of a rank (None: of this one)."""
    ranks = plan.size("context")
    if ranks == 1:
        return jnp.arange(length, dtype=jnp.int32)
    rank, half = plan.index("context") if rank is None else rank, jnp.arange(length // 2, dtype=jnp.int32)
    return jnp.concatenate([rank * len(half) + half, (2 * ranks - 1 - rank) * len(half) + half])


def parts(x_bt: Array, plan: Plan) -> Array:
    """(b p, t / p, ...): each part of this rank as a row of its own; the parts of a row are adjacent."""
    count = _part_count(plan)
    return x_bt.reshape(x_bt.shape[0] * count, x_bt.shape[1] // count, *x_bt.shape[2:])


def joined(x_bt: Array, plan: Plan) -> Array:
    """The inverse of `parts`."""
    count = _part_count(plan)
    return x_bt.reshape(x_bt.shape[0] // count, x_bt.shape[1] * count, *x_bt.shape[2:])


def earlier(x_bt: Array, steps: int, plan: Plan) -> Array:
    """(b p, steps, ...): the tokens before each of this rank's parts, oldest first; zero before the sequence.

    Raises ValueError if a part has fewer than `steps` tokens.
    """
    x_bpt = _by_part(x_bt, steps, plan)
    tail_bpk = x_bpt[:, :, x_bpt.shape[2] - steps :]
    if plan.size("context") == 1 or not steps:
        return jnp.zeros_like(tail_bpk[:, 0])
    rank, first, second = plan.index("context"), tail_bpk[:, 0], tail_bpk[:, 1]
    before_first = jnp.where(rank == 0, 0, plan.shift(first, "context", 1))
    before_second = jnp.where(rank == plan.size("context") - 1, first, plan.shift(second, "context", -1))
    return _rows(before_first, before_second)


def later(x_bt: Array, steps: int, plan: Plan) -> Array:
    """(b, t, ...): for each of this rank's tokens the one `steps` later in the sequence; zero past the end.

    Raises ValueError if there are two parts and they have fewer than `steps` tokens.
    """
    if not steps:
        return x_bt
    if plan.size("context") == 1:
        missing = min(steps, x_bt.shape[1])
        return jnp.pad(x_bt[:, steps:], ((0, 0), (0, missing)) + ((0, 0),) * (x_bt.ndim - 2))
    head_bpk = _by_part(x_bt, steps, plan)[:, :, :steps]
    rank, first, second = plan.index("context"), head_bpk[:, 0], head_bpk[:, 1]
    after_first = jnp.where(rank == plan.size("context") - 1, second, plan.shift(first, "context", -1))
    after_second = jnp.where(rank == 0, 0, plan.shift(second, "context", 1))
    return joined(jnp.concatenate([parts(x_bt, plan)[:, steps:], _rows(after_first, after_second)], axis=1), plan)


def entering(decay: Array, state: Array, plan: Plan) -> Array:
    """The state that enters each of this rank's parts (b p, …), where a part maps an entering state S to decay · S +
    state.

    The sequence starts from zero. decay (b p, …) broadcasts against state. An associative scan by doubling: up the
    ranks over their first parts, then down again from the last rank's second part. Each rank sends 2 log2(c) + 2 states
    and 2 log2(c) - 1 decays.
    """
    ranks = plan.size("context")
    if ranks == 1:
        return jnp.zeros_like(state)
    by_part = lambda a: a.reshape(-1, 2, *a.shape[1:])  # noqa: E731
    decay, state = by_part(decay), by_part(state)
    rank = plan.index("context")
    first = _doubling((decay[:, 0], state[:, 0]), 1, plan)
    second = decay[:, 1], state[:, 1]
    turn = rank == ranks - 1
    second = _doubling(_where(turn, _then(first, second), second), -1, plan, last=True)
    enters_first = jnp.where(rank == 0, 0, plan.shift(first[1], "context", 1))
    enters_second = jnp.where(turn, first[1], plan.shift(second[1], "context", -1))
    return _rows(enters_first, enters_second)


def continued(decay: Array, state: Array, start: Array, plan: Plan) -> tuple[Array, Array]:
    """`entering` for a sequence that starts from the states `start` (b, …); and the states after the sequence (b, …),
    on every rank. Requires several ranks."""
    start_bp = at_start(start, plan)
    enters_bp = entering(decay, state + decay * start_bp, plan) + start_bp
    left_bp = decay * enters_bp + state
    last = plan.index("context") == 0  # rank 0 holds the last part of the sequence
    after = plan.sum(jnp.where(last, left_bp.reshape(-1, 2, *state.shape[1:])[:, 1], 0), "context")
    return enters_bp, vary_like(after, state)


def at_start(x: Array, plan: Plan) -> Array:
    """(b p, …): `x` (b, …) for the part that begins the sequence, zeros for all other parts; to be added to a result of
    `earlier`, which is zero before the sequence. Requires several ranks."""
    return _rows(jnp.where(plan.index("context") == 0, x, 0), jnp.zeros_like(x))


def _doubling(element: tuple[Array, Array], by: int, plan: Plan, *, last: bool = False) -> tuple[Array, Array]:
    """The composition of the (decay, state) of all ranks up to this one, in the direction `by`. last: whether no decay
    is needed, so that its last exchange is omitted."""
    ranks, rank, distance = plan.size("context"), plan.index("context"), 1
    order = rank if by > 0 else ranks - 1 - rank
    decay, state = element
    while distance < ranks:
        before = plan.shift(state, "context", by * distance)
        state = jnp.where(order >= distance, decay * before + state, state)
        if not last or 2 * distance < ranks:
            decay = jnp.where(order >= distance, decay * plan.shift(decay, "context", by * distance), decay)
        distance *= 2
    return decay, state


def _where(condition: Any, one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    return jnp.where(condition, one[0], other[0]), jnp.where(condition, one[1], other[1])


def _then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    """`second` after `first`, as maps S -> decay · S + state."""
    return second[0] * first[0], second[0] * first[1] + second[1]


def whole(x_bt: Array, plan: Plan) -> Array:
    """(b, s, ...): the whole sequence in order, on every rank; the gradient is reduce-scattered."""
    ranks = plan.size("context")
    if ranks == 1:
        return x_bt
    x_rbt = plan.gather(x_bt[None], "context", dim=0)
    return _in_order(jnp.moveaxis(x_rbt, 0, 1))


def own(x_bs: Array, plan: Plan) -> Array:
    """(b, t, ...): this rank's tokens of a sequence (b, s, ...) that every rank has whole."""
    if plan.size("context") == 1:
        return x_bs
    return jnp.take(x_bs, indices(x_bs.shape[1] // plan.size("context"), plan), axis=1)


def taken(x_bt: Array, index_bk: Array, plan: Plan) -> Array:
    """(b, k, …): each row's tokens at these indices of the sequence, on every rank."""
    trailing = (1,) * (x_bt.ndim - 2)
    if plan.size("context") == 1:
        return jnp.take_along_axis(x_bt, index_bk.reshape(*index_bk.shape, *trailing), axis=1)
    index_t = indices(x_bt.shape[1], plan)
    here_bkt = index_bk[..., None] == index_t
    local_bk, there_bk = jnp.argmax(here_bkt, axis=-1), jnp.any(here_bkt, axis=-1)
    local_bk, there_bk = (a.reshape(*index_bk.shape, *trailing) for a in (local_bk, there_bk))
    return vary_like(plan.sum(jnp.where(there_bk, jnp.take_along_axis(x_bt, local_bk, axis=1), 0), "context"), x_bt)


def copied(plan: Plan) -> Plan:
    """The plan for work that every rank of `context` repeats, on rows that it holds whole."""
    return _without_context(plan, ())


def over_rows(plan: Plan) -> Plan:
    """The plan in which the ranks of `context` hold different rows, as those of `data` do."""
    return _without_context(plan, plan.rules["context"])


def _without_context(plan: Plan, more: tuple[str, ...]) -> Plan:
    """The plan without a `context` axis, whose batch is also split over these axes of the mesh."""
    moved = lambda rules: {**rules, "batch": rules["batch"] + more, "context": ()}  # noqa: E731
    plan = dataclasses.replace(plan, rules=moved(plan.rules), storage=moved(plan.storage))
    return plan.with_stream(plan.stream)


def to_heads(x_bth: Array, plan: Plan) -> Array:
    """(b, s, h / c, ...): the whole sequence in order, for this rank's share of the heads (all-to-all)."""
    ranks = plan.size("context")
    if ranks == 1:
        return x_bth
    batch, time, heads, *rest = x_bth.shape
    x_rbth = jnp.moveaxis(x_bth.reshape(batch, time, ranks, heads // ranks, *rest), 2, 0)
    return _in_order(jnp.moveaxis(plan.exchange(x_rbth, "context"), 0, 1))


def to_tokens(x_bsh: Array, plan: Plan) -> Array:
    """The inverse of `to_heads`: all heads (b, t, h, ...) of this rank's tokens."""
    ranks = plan.size("context")
    if ranks == 1:
        return x_bsh
    batch, length, heads, *rest = x_bsh.shape
    chunks_bkth = x_bsh.reshape(batch, 2 * ranks, length // (2 * ranks), heads, *rest)
    x_brpth = jnp.stack([chunks_bkth[:, :ranks], jnp.flip(chunks_bkth[:, ranks:], 1)], axis=2)
    x_rbth = jnp.moveaxis(x_brpth.reshape(batch, ranks, length // ranks, heads, *rest), 1, 0)
    return jnp.moveaxis(plan.exchange(x_rbth, "context"), 0, 2).reshape(batch, length // ranks, heads * ranks, *rest)


def _part_count(plan: Plan) -> int:
    return min(plan.size("context"), 2)


def _by_part(x_bt: Array, steps: int, plan: Plan) -> Array:
    """(b, p, t / p, ...). Raises ValueError if a part has fewer than `steps` tokens."""
    count = _part_count(plan)
    if x_bt.shape[1] // count < steps:
        raise ValueError(f"parts of {x_bt.shape[1] // count} tokens: expected at least {steps}")
    return x_bt.reshape(x_bt.shape[0], count, -1, *x_bt.shape[2:])


def _rows(first: Array, second: Array) -> Array:
    """The two parts' (b, ...) as rows (b p, ...)."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def _in_order(x_brt: Array) -> Array:
    """(b, s, ...): the ranks' tokens (b, r, t, ...) in the sequence's order."""
    batch, ranks, time, *rest = x_brt.shape
    x_brpt = x_brt.reshape(batch, ranks, 2, time // 2, *rest)
    chunks_bkt = jnp.concatenate([x_brpt[:, :, 0], jnp.flip(x_brpt[:, :, 1], 1)], axis=1)
    return chunks_bkt.reshape(batch, ranks * time, *rest)
