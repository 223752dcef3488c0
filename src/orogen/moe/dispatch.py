"""Moves tokens to the ranks that hold their experts, and the experts' outputs back.

The dispatches are chosen by name (`PlanConfig.dispatch`) and run inside the plan's shard_map. A dispatch is a class
with two static methods:

    dispatch(x_nd, idx_nk, keep_nk, plan, *, n_experts, capacity) -> Dispatched(rows, group_sizes, ticket)
    combine(rows, w_nk, ticket, plan) -> y_nd

x_nd: this rank's tokens, of any float dtype; idx_nk: int32, the global expert of each assignment; w_nk: float32, its
weight. Assignments that the mask `keep_nk` excludes reach no expert and add nothing; the caller makes the mask and
counts them. capacity: the most assignments that an expert takes from this rank, which `keep_nk` respects already; a
dispatch with padded buffers sizes them by it. Rows without a token are zero.

The ranks of expert_tensor split each expert's hidden units: every rank passes the rows of all of them through its share
of the units, and the partial outputs are reduce-scattered.

Letters: n tokens of this rank, m tokens of all ranks that hold the experts, d width, k experts per token, e experts,
r rows, which are copies of tokens; in `Ragged` also s sender or receiver, t rank of expert_tensor, x expert and sender.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.grouped_matmul import prefers_named
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.kernels.permutation import sum_rows, take_rows
from orogen.parallel.plan import Plan
from orogen.parallel.ragged import Runs
from orogen.parallel.varying import vary_like

# Up to this many assignments are sorted by comparing all pairs: two kernels instead of ten, whose launches take longer
# than their work in decoding.
FEW = 1024


class Ticket(NamedTuple):
    """What `combine` needs to undo a dispatch.

    slots_nk: the row of each assignment; source_r: the assignment (token · k + choice) of each row; both int32, and an
    index past the end means none. kept: whatever else the dispatch needs. overflow: float32, how many assignments did
    not fit into a buffer; with any, the step must not be used.
    """

    slots_nk: Array
    source_r: Array
    kept: Any = None
    overflow: Array | float = 0.0


class Dispatched(NamedTuple):
    """The rows (r, d) of this rank's experts, sorted by expert; the rows per expert, as `grouped_matmul` takes them (an
    int if all have the same number); and the ticket by which `combine` returns the experts' outputs."""

    rows: Array
    group_sizes: Array | RowGroups | int
    ticket: Ticket


def expert_capacity(tokens: int, k: int, n_experts: int, factor: float | None) -> int:
    """Rows that one expert takes from one rank: ceil(tokens · k / e · factor), at most `tokens`. factor: None drops
    nothing."""
    return tokens if factor is None else math.ceil(min(tokens, tokens * k / n_experts * factor))


def within_capacity(idx_nk: Array, w_nk: Array, valid_n: Array, *, n_experts: int, capacity: int, policy: str) -> Array:
    """Mask (n, k) of the assignments that fit into an expert's capacity: the first `capacity` of its valid assignments
    in token order (policy `position`), or those with the largest weights, ties going to the earlier token (`probs`)."""
    if capacity >= idx_nk.shape[0]:
        return jnp.broadcast_to(valid_n[:, None], idx_nk.shape)
    first_nk = -lax.stop_gradient(w_nk) if policy == "probs" else None
    return _rank_in_expert(idx_nk, valid_n[:, None], n_experts, first_nk) < capacity


def drop_margin(
    idx_nk: Array, w_nk: Array, keep_nk: Array, replayed_nk: Array, *, n_experts: int, policy: str
) -> Array:
    """(n,) by how much a token's kept assignments differ from the replayed ones.

    At each expert, it is the largest weight among the assignments that only this run keeps, minus the smallest among
    those that only the replay keeps. 0 where both agree; infinite if an expert has assignments of one kind only, and
    under the policy `position`, which compares no weights.
    """
    lost_nk, gained_nk = keep_nk & ~replayed_nk, replayed_nk & ~keep_nk
    expert_nke = idx_nk[..., None] == jnp.arange(n_experts)

    def weights_by_expert(mask_nk: Array, fill: float) -> Array:
        return jnp.where(mask_nk[..., None] & expert_nke, w_nk[..., None], fill)

    heaviest_e = weights_by_expert(lost_nk, -jnp.inf).max((0, 1))
    lightest_e = weights_by_expert(gained_nk, jnp.inf).min((0, 1))
    paired_e = jnp.isfinite(heaviest_e) & jnp.isfinite(lightest_e) & (policy == "probs")
    margin_e = jnp.where(paired_e, heaviest_e - lightest_e, jnp.inf)
    return jnp.where(lost_nk | gained_nk, margin_e[idx_nk], 0).max(-1)


def _rank_in_expert(idx_nk: Array, kept_nk: Array, n_experts: int, first_nk: Array | None = None) -> Array:
    """The position (n, k) of each kept assignment in its expert's queue, in token order or by ascending `first_nk`; n ·
    k for an assignment that is not kept."""
    flat = jnp.where(kept_nk, idx_nk, n_experts).reshape(-1)
    queue = jnp.arange(flat.size) if first_nk is None else jnp.argsort(first_nk.reshape(-1), stable=True)
    order = queue[jnp.argsort(flat[queue], stable=True)]
    starts = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1), side="left")
    ranks = jnp.arange(flat.size) - starts[flat[order]]
    ranks = jnp.zeros_like(flat).at[order].set(ranks, unique_indices=True)
    return jnp.where(flat < n_experts, ranks, flat.size).reshape(idx_nk.shape)


def _take(x_nd: Array, slots_nk: Array, source_r: Array, plan: Plan) -> Array:
    """The tokens (n, d) copied into rows (r, d)."""
    return take_rows(x_nd, slots_nk, source_r, implementation=plan.config.permutation)


def _sum(rows_rd: Array, w_nk: Array, ticket: Ticket, plan: Plan) -> Array:
    """Each token's weighted sum (n, d) of its rows."""
    return sum_rows(rows_rd, w_nk, ticket.slots_nk, ticket.source_r, implementation=plan.config.permutation)


def _with_inverse(slots_nk: Array, n_rows: int) -> tuple[Array, Array]:
    """The slots, and for each row the flat assignment (token · k + choice) that fills it; n · k if none does."""
    flat = slots_nk.reshape(-1)
    if flat.size * n_rows <= FEW**2:
        held_rf = flat == jnp.arange(n_rows)[:, None]
        source_r = jnp.min(jnp.where(held_rf, jnp.arange(flat.size, dtype=jnp.int32), flat.size), axis=1)
        return _routing((slots_nk, source_r))
    empty = vary_like(jnp.full(n_rows, flat.size, jnp.int32), slots_nk)
    source_r = empty.at[flat].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop", unique_indices=True)
    return _routing((slots_nk, source_r))


def _slots(flat: Array) -> Array:
    """(n,) int32: the position of each number in a stable sort of all."""
    if flat.size <= FEW:
        index = jnp.arange(flat.size)
        before = (flat < flat[:, None]) | ((flat == flat[:, None]) & (index < index[:, None]))
        return jnp.sum(before, axis=1, dtype=jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    return jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)


def _routing(tree: Any) -> Any:
    """`tree` under the checkpoint name `routing`, by which remat policies keep it."""
    return jax.tree.map(lambda a: checkpoint_name(a, "routing"), tree)


class AllGather:
    """Every rank gathers the tokens of all expert ranks and keeps those of its own experts, sorted by expert."""

    @staticmethod
    def dispatch(
        x_nd: Array, idx_nk: Array, keep_nk: Array, plan: Plan, *, n_experts: int, capacity: int
    ) -> Dispatched:
        """Rows (m · min(k, local experts), d) and group sizes (local experts,). For few tokens, where the grouped
        product prefers it, the tokens themselves (m, d), with the expert of each assignment (m · k,) in place of group
        sizes."""
        x_md, idx_mk, keep_mk = (plan.gather(a, "expert_ranks", dim=0) for a in (x_nd, idx_nk, keep_nk))
        local = n_experts // plan.size("expert")
        idx_mk = idx_mk - plan.index("expert") * local
        here_mk = keep_mk & (idx_mk >= 0) & (idx_mk < local)
        flat = jnp.where(here_mk, idx_mk, local).reshape(-1)
        if prefers_named(plan.config.grouped_matmul, flat.size):
            source_r = jnp.where(flat < local, jnp.arange(flat.size, dtype=jnp.int32), flat.size)
            slots_mk, source_r, flat = _routing((source_r.reshape(here_mk.shape), source_r, flat))
            return Dispatched(x_md, RowGroups(flat), Ticket(slots_mk, source_r))
        n_rows = idx_mk.shape[0] * min(idx_mk.shape[1], local)
        slots = _slots(flat)
        slots_mk = jnp.where(here_mk, slots.reshape(here_mk.shape), n_rows)
        group_sizes = jnp.sum(flat[:, None] == jnp.arange(local), 0, dtype=jnp.int32)
        slots_mk, source_r = _with_inverse(slots_mk, n_rows)
        return Dispatched(_take(x_md, slots_mk, source_r, plan), group_sizes, Ticket(slots_mk, source_r))

    @staticmethod
    def combine(rows_rd: Array, w_nk: Array, ticket: Ticket, plan: Plan) -> Array:
        """y (n, d): each rank adds up its experts' rows for all tokens, and the ranks' sums are reduce-scattered."""
        w_mk = plan.gather(w_nk, "expert_ranks", dim=0)
        y_md = _sum(rows_rd, w_mk, ticket, plan)
        return plan.scatter(y_md, "expert_ranks", dim=0)


class AllToAll:
    """Each rank sends `capacity` rows to every expert, padded if fewer are filled, and gets as many back."""

    @staticmethod
    def dispatch(
        x_nd: Array, idx_nk: Array, keep_nk: Array, plan: Plan, *, n_experts: int, capacity: int
    ) -> Dispatched:
        """Rows (local experts · ranks · capacity, d), the same number for each expert."""
        ranks, local = plan.size("expert"), n_experts // plan.size("expert")
        rank_nk = _rank_in_expert(idx_nk, keep_nk, n_experts)
        n_rows = n_experts * capacity
        slots_nk = jnp.where(keep_nk, idx_nk * capacity + rank_nk, n_rows)
        slots_nk, source_r = _with_inverse(slots_nk, n_rows)
        rows_rd = plan.exchange(_take(x_nd, slots_nk, source_r, plan), "expert")
        rows = rows_rd.reshape(ranks, local, capacity, -1).swapaxes(0, 1).reshape(local, ranks * capacity, -1)
        rows = plan.gather(rows, "expert_tensor", dim=1)
        return Dispatched(rows.reshape(-1, rows.shape[2]), rows.shape[1], Ticket(slots_nk, source_r, capacity))

    @staticmethod
    def combine(rows_rd: Array, w_nk: Array, ticket: Ticket, plan: Plan) -> Array:
        """y (n, d): rows go back to the ranks they came from, and each token sums its own."""
        ranks, capacity, width = plan.size("expert"), ticket.kept, rows_rd.shape[-1]
        rows = rows_rd.reshape(-1, plan.size("expert_tensor") * ranks * capacity, width)
        rows = plan.scatter(rows, "expert_tensor", dim=1).reshape(-1, ranks, capacity, width)
        back = rows.swapaxes(0, 1).reshape(-1, width)
        return _sum(plan.exchange(back, "expert"), w_nk, ticket, plan)


class Ragged:
    """Each rank sends every other rank exactly the rows for that rank's experts, without padding.

    A receiver's buffer holds `rows_of_rank` rows. Rows beyond that, in the order of senders, are not sent but counted
    as overflow.
    """

    @staticmethod
    def dispatch(
        x_nd: Array, idx_nk: Array, keep_nk: Array, plan: Plan, *, n_experts: int, capacity: int
    ) -> Dispatched:
        """Rows (expert_tensor ranks · `rows_of_rank`, d) and group sizes (local experts,)."""
        ranks, local = plan.size("expert"), n_experts // plan.size("expert")
        size = rows_of_rank(*idx_nk.shape, ranks=ranks, local=local, factor=plan.config.buffer_factor)
        # Sorted by expert, hence by rank: the rows for one rank are one run.
        flat = jnp.where(keep_nk, idx_nk, n_experts).reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        slots = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
        slots_nk = jnp.where(keep_nk, slots.reshape(keep_nk.shape), flat.size)
        slots_nk, source_r = _with_inverse(slots_nk, flat.size)
        counts_e = jnp.sum(flat[:, None] == jnp.arange(n_experts), 0, dtype=jnp.int32)
        runs, received_re, overflow = _exchange(plan.gather(counts_e[None], "expert", dim=0), local, size, plan)
        runs, received_re = _routing((runs, received_re))
        buffer_rd = plan.ragged_exchange(_take(x_nd, slots_nk, source_r, plan), runs, "expert", rows=size)
        # Rows arrive ordered by expert_tensor rank, sender and expert; here they are sorted by expert.
        buffer_rd = plan.gather(buffer_rd, "expert_tensor", dim=0)
        counts_tre = plan.gather(received_re[None], "expert_tensor", dim=0)
        sorted_r = _by_expert(counts_tre, size)
        sorted_r1, back_r = _with_inverse(sorted_r[:, None], len(buffer_rd))
        rows_rd = _take(buffer_rd, back_r[:, None], sorted_r1[:, 0], plan)
        ticket = Ticket(slots_nk, source_r, (runs, sorted_r1, back_r), overflow)
        return Dispatched(rows_rd, counts_tre.sum((0, 1)), ticket)

    @staticmethod
    def combine(rows_rd: Array, w_nk: Array, ticket: Ticket, plan: Plan) -> Array:
        """y (n, d): rows go back to the ranks they came from, and each token sums its own."""
        runs, sorted_r1, back_r = ticket.kept
        buffer_rd = plan.scatter(_take(rows_rd, sorted_r1, back_r, plan), "expert_tensor", dim=0)
        rows = plan.ragged_exchange(buffer_rd, runs.reversed(), "expert", rows=ticket.slots_nk.size)
        return _sum(rows, w_nk, ticket, plan)


def rows_of_rank(tokens: int, k: int, *, ranks: int, local: int, factor: float | None) -> int:
    """Rows of a rank's buffer: one for every assignment that could arrive, or ceil(tokens · k · factor) if that is
    less.

    tokens: of each rank; local: experts of each rank; factor: `PlanConfig.buffer_factor`.
    """
    most = tokens * ranks * min(k, local)
    return most if factor is None else math.ceil(min(most, tokens * k * factor))


class _Exchange(NamedTuple):
    """The runs of rows that are exchanged; the rows (r, e) that arrive here, by sender and local expert; and how many
    of this rank's rows do not fit into their receivers' buffers, float32."""

    runs: Runs
    received_re: Array
    overflow: Array


def _exchange(counts_re: Array, local: int, size: int, plan: Plan) -> _Exchange:
    """What the ranks exchange, given the number of rows that each rank (r) has for each global expert (e). size: rows
    of a rank's buffer."""
    ranks = len(counts_re)
    counts_rse = counts_re.reshape(ranks, ranks, local)  # by sender, receiver and the receiver's experts
    wanted_rs = counts_rse.sum(2)
    starts_rs = jnp.cumsum(wanted_rs, 1) - wanted_rs
    lands_rs = jnp.cumsum(wanted_rs, 0) - wanted_rs
    sizes_rs = jnp.clip(size - lands_rs, 0, wanted_rs)
    lands_rs = jnp.minimum(lands_rs, size)
    rank = plan.index("expert")

    def sent(table_rs: Array) -> Array:
        return jnp.take(table_rs, rank, axis=0)

    def arriving(table_rs: Array) -> Array:
        return jnp.take(table_rs, rank, axis=1)

    runs = Runs(
        starts=sent(starts_rs), sizes=sent(sizes_rs), lands=sent(lands_rs),
        from_starts=arriving(starts_rs), received=arriving(sizes_rs), arrives=arriving(lands_rs),
    )  # fmt: skip
    mine_re = arriving(counts_rse)
    before_re = jnp.cumsum(mine_re, 1) - mine_re
    received_re = jnp.clip(runs.received[:, None] - before_re, 0, mine_re)
    return _Exchange(runs, received_re, jnp.sum(sent(wanted_rs - sizes_rs)).astype(jnp.float32))


def _by_expert(counts_tre: Array, size: int) -> Array:
    """For each row in the order of experts, its row in the buffers; past the end if there is none.

    Each of the t buffers of `size` rows is ordered by sender, then by expert.
    """
    buffers = len(counts_tre)
    counts_tx = counts_tre.reshape(buffers, -1)
    starts_tre = (jnp.cumsum(counts_tx, 1) - counts_tx + size * jnp.arange(buffers)[:, None]).reshape(counts_tre.shape)
    counts_x, starts_x = (jnp.moveaxis(a, 2, 0).reshape(-1) for a in (counts_tre, starts_tre))
    ends_x = jnp.cumsum(counts_x)
    row_r = jnp.arange(buffers * size, dtype=jnp.int32)
    run_r = jnp.minimum(jnp.searchsorted(ends_x, row_r, side="right"), len(ends_x) - 1)
    found_r = starts_x[run_r] + row_r - (ends_x - counts_x)[run_r]
    return jnp.where(row_r < ends_x[-1], found_r, buffers * size).astype(jnp.int32)


DISPATCHES = {"allgather": AllGather, "alltoall": AllToAll, "ragged": Ragged}
