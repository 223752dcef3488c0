"""Moves tokens to the ranks that hold their experts, and the experts' outputs back.

One contract, chosen by name, all inside the plan's shard_map:
`dispatch(x_nd, idx_nk, keep_nk, n_experts, capacity, plan) -> rows, group_sizes, ticket` and
`combine(rows, w_nk, ticket, plan) -> y_nd`. Assignments that `keep_nk` rules out reach no expert and add nothing; who
rules them out counts them.

Letters: n tokens of this rank, m tokens of all ranks of the expert axis, d width, k experts per token, e experts,
r rows, c capacity.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like


class Ticket(NamedTuple):
    """What combine needs: the row of each assignment, the assignment (token · k + choice) of each row, and the rows
    that one expert takes from one rank. An index past the end means none."""

    slots_nk: Array
    source_r: Array
    capacity: int


def expert_capacity(tokens: int, k: int, n_experts: int, factor: float | None) -> int:
    """Rows that one expert takes from one rank: ceil(tokens · k / e · factor), never above `tokens`."""
    return tokens if factor is None else min(tokens, math.ceil(tokens * k / n_experts * factor))


def within_capacity(idx_nk: Array, valid_n: Array, *, n_experts: int, capacity: int) -> Array:
    """Which assignments (n, k) an expert has room for: the first `capacity` of its valid ones in token order."""
    if capacity >= idx_nk.shape[0]:
        return jnp.broadcast_to(valid_n[:, None], idx_nk.shape)
    return _rank_in_expert(idx_nk, valid_n[:, None], n_experts) < capacity


def _rank_in_expert(idx_nk: Array, kept_nk: Array, n_experts: int) -> Array:
    """Place of each kept assignment in its expert's queue, in token order; the number of assignments if not kept."""
    flat = jnp.where(kept_nk, idx_nk, n_experts).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    starts = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1), side="left")
    ranks = jnp.arange(flat.size) - starts[flat[order]]
    ranks = jnp.zeros_like(flat).at[order].set(ranks, unique_indices=True)
    return jnp.where(flat < n_experts, ranks, flat.size).reshape(idx_nk.shape)


# The permutation, forward and backward, without a scatter-add: a token's gradient is gathered from its k rows.


@jax.custom_vjp
def _take_rows(x_nd: Array, slots_nk: Array, source_r: Array) -> Array:
    k = slots_nk.shape[1]
    return jnp.take(x_nd, source_r // k, axis=0, mode="fill", fill_value=0)


def _take_rows_forward(x_nd, slots_nk, source_r):
    return _take_rows(x_nd, slots_nk, source_r), (slots_nk, source_r)


def _take_rows_backward(residuals, g_rd):
    slots_nk, source_r = residuals
    g_nkd = jnp.take(g_rd, slots_nk, axis=0, mode="fill", fill_value=0)
    return g_nkd.sum(1), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def _sum_rows(rows_rd: Array, w_nk: Array, slots_nk: Array, source_r: Array) -> Array:
    y_nkd = jnp.take(rows_rd, slots_nk, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("nkd,nk->nd", y_nkd, w_nk, preferred_element_type=jnp.float32).astype(rows_rd.dtype)


def _sum_rows_forward(rows_rd, w_nk, slots_nk, source_r):
    return _sum_rows(rows_rd, w_nk, slots_nk, source_r), (rows_rd, w_nk, slots_nk, source_r)


def _sum_rows_backward(residuals, g_nd):
    rows_rd, w_nk, slots_nk, source_r = residuals
    k = slots_nk.shape[1]
    w_r = jnp.take(w_nk.reshape(-1), source_r, mode="fill", fill_value=0).astype(g_nd.dtype)
    g_rd = jnp.take(g_nd, source_r // k, axis=0, mode="fill", fill_value=0) * w_r[:, None]
    y_nkd = jnp.take(rows_rd, slots_nk, axis=0, mode="fill", fill_value=0)
    g_nk = jnp.einsum("nkd,nd->nk", y_nkd, g_nd, preferred_element_type=jnp.float32).astype(w_nk.dtype)
    return g_rd.astype(rows_rd.dtype), g_nk, None, None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


def _invert(slots_nk: Array, n_rows: int) -> Array:
    """For each row, which flat assignment (token · k + choice) fills it; the number of assignments if none does."""
    flat = slots_nk.reshape(-1)
    empty = vary_like(jnp.full(n_rows, flat.size, jnp.int32), slots_nk)
    return empty.at[flat].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop", unique_indices=True)


class AllGather:
    """Every rank of the expert axis sees all their tokens and keeps those of its own experts, sorted by expert."""

    @staticmethod
    def dispatch(x_nd: Array, idx_nk: Array, keep_nk: Array, n_experts: int, capacity: int, plan: Plan):
        """Rows (m · min(k, local experts), d) sorted by expert, group sizes (local experts,), ticket."""
        x_md, idx_mk, keep_mk = (plan.gather(a, "expert", dim=0) for a in (x_nd, idx_nk, keep_nk))
        local = n_experts // plan.size("expert")
        idx_mk = idx_mk - plan.index("expert") * local
        here_mk = keep_mk & (idx_mk >= 0) & (idx_mk < local)
        flat = jnp.where(here_mk, idx_mk, local).reshape(-1)
        n_rows = idx_mk.shape[0] * min(idx_mk.shape[1], local)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        places = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
        slots_mk = jnp.where(here_mk, places.reshape(here_mk.shape), n_rows)
        group_sizes = jnp.sum(flat[:, None] == jnp.arange(local), 0, dtype=jnp.int32)
        source_r = _invert(slots_mk, n_rows)
        return _take_rows(x_md, slots_mk, source_r), group_sizes, Ticket(slots_mk, source_r, capacity)

    @staticmethod
    def combine(rows_rd: Array, w_nk: Array, ticket: Ticket, plan: Plan) -> Array:
        """y (n, d): each rank adds up its experts' rows for all tokens, and the ranks' sums are scattered back."""
        w_mk = plan.gather(w_nk, "expert", dim=0)
        y_md = _sum_rows(rows_rd, w_mk, ticket.slots_nk, ticket.source_r)
        return plan.scatter(y_md, "expert", dim=0)


class AllToAll:
    """Each rank sends `capacity` rows to every expert, filled or not, and gets as many back."""

    @staticmethod
    def dispatch(x_nd: Array, idx_nk: Array, keep_nk: Array, n_experts: int, capacity: int, plan: Plan):
        """Rows (local experts · ranks · capacity, d) sorted by expert, rows per expert as an int, ticket."""
        ranks, local = plan.size("expert"), n_experts // plan.size("expert")
        rank_nk = _rank_in_expert(idx_nk, keep_nk, n_experts)
        n_rows = n_experts * capacity
        slots_nk = jnp.where(keep_nk, idx_nk * capacity + rank_nk, n_rows)
        source_r = _invert(slots_nk, n_rows)
        rows_rd = plan.exchange(_take_rows(x_nd, slots_nk, source_r), "expert")
        rows = rows_rd.reshape(ranks, local, capacity, -1).swapaxes(0, 1)
        return rows.reshape(n_rows, -1), ranks * capacity, Ticket(slots_nk, source_r, capacity)

    @staticmethod
    def combine(rows_rd: Array, w_nk: Array, ticket: Ticket, plan: Plan) -> Array:
        """y (n, d): rows go back to the ranks they came from, and each token sums its own."""
        ranks, width = plan.size("expert"), rows_rd.shape[-1]
        back = rows_rd.reshape(-1, ranks, ticket.capacity, width).swapaxes(0, 1).reshape(-1, width)
        return _sum_rows(plan.exchange(back, "expert"), w_nk, ticket.slots_nk, ticket.source_r)


DISPATCHES = {"allgather": AllGather, "alltoall": AllToAll}
