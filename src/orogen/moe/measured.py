"""Statistics of routed experts from which pruning computes the importance of experts and of their hidden units.

Letters: b batch, t time of the tokens that this rank routes, n tokens (b · t), k experts per token, e experts, r rows
sorted by expert, w expert width, f hidden.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.layers.multiply import flat
from orogen.layers.probe import whole
from orogen.moe.dispatch import DISPATCHES
from orogen.moe.router import Routing, expert_counts
from orogen.parallel.plan import Plan


def expert_statistics(
    routing: Routing, keep_btk: Array, results: tuple[Array, Array], group_sizes: Any, plan: Plan, *, n_experts: int,
    capacity: int,
) -> dict[str, Array]:  # fmt: skip
    """Float32 statistics of each expert, whole and equal on every device.

    Sums over the batch's assignments to an expert, (e): `expert_count`; `expert_weight`, of the router's weights; and
    `expert_output`, of the L2 norm of the weighted output. `expert_width` (e, f): the square of the mean of
    |hidden unit| over the expert's assignments.

    results: the experts' outputs (r, w) and hidden units (r, f), for the rows that the plan's dispatch returned.
    keep_btk: the assignments that were sent. Raises ValueError for rows that are not sorted by expert.
    """
    if isinstance(group_sizes, RowGroups):
        raise ValueError("rows that name their experts cannot be measured; expected more tokens, sorted by expert")
    experts_nk, weights_nk, keep_nk = flat(routing.experts), flat(routing.weights), flat(keep_btk)
    # An expert's rank does not know the router's weights of its rows. So each token's weights and choices, and a 1 that
    # marks rows with a token, are dispatched like the token itself: in float32, which holds an expert's number exactly.
    marked_nc = jnp.concatenate(
        [a.astype(jnp.float32) for a in (weights_nk, experts_nk, jnp.ones((len(experts_nk), 1)))], axis=-1
    )
    dispatcher = DISPATCHES[plan.config.dispatch]
    found_rc = dispatcher.dispatch(
        marked_nc, experts_nk, keep_nk, plan, n_experts=n_experts, capacity=capacity
    ).rows  # fmt: skip
    k = experts_nk.shape[1]
    local = n_experts // plan.size("expert")
    expert_r = _expert_of_rows(group_sizes, len(found_rc))
    chosen_rk = found_rc[:, k : 2 * k] == (plan.index("expert") * local + expert_r)[:, None]
    weight_r = jnp.sum(jnp.where(chosen_rk, found_rc[:, :k], 0), axis=1)
    mine_er = ((expert_r == jnp.arange(local)[:, None]) & (found_rc[:, -1] > 0)).astype(jnp.float32)
    returned_rw, hidden_rf = (a.astype(jnp.float32) for a in results)
    # Ranks of expert_tensor hold partial outputs of the same rows, so only the first of them counts the norm.
    norm_r = jnp.sqrt(jnp.sum(jnp.square(plan.sum(returned_rw, "expert_tensor")), axis=1))
    output_e = mine_er @ (weight_r * norm_r) * (plan.index("expert_tensor") == 0)
    size_ef = plan.over_others(mine_er @ jnp.abs(hidden_rf), "expert", "expert_mlp")
    size_ef = whole(plan.gather(size_ef, "expert", dim=0), plan, "expert_mlp", dim=1)
    count_e, total_e = (_over_tokens(a, plan) for a in _of_tokens(experts_nk, weights_nk, keep_nk, n_experts))
    return {
        "expert_count": count_e,
        "expert_weight": total_e,
        "expert_output": whole(plan.over_others(output_e, "expert"), plan, "expert"),
        "expert_width": jnp.square(size_ef / jnp.maximum(count_e, 1)[:, None]),
    }


def _expert_of_rows(group_sizes: Array | int, rows: int) -> Array:
    """The local expert (r) of each row; past the last one for rows without an expert."""
    row_r = jnp.arange(rows)
    if isinstance(group_sizes, int):
        return row_r // group_sizes
    return jnp.searchsorted(jnp.cumsum(group_sizes), row_r, side="right")


def _of_tokens(experts_nk: Array, weights_nk: Array, keep_nk: Array, n_experts: int) -> tuple[Array, Array]:
    """(e): the assignments of this rank's tokens, and the sum of their weights."""
    count_e = expert_counts(experts_nk, keep_nk, n_experts, axes=(0, 1))
    hits_nke = (experts_nk[..., None] == jnp.arange(n_experts)) & keep_nk[..., None]
    return count_e, jnp.sum(jnp.where(hits_nke, weights_nk[..., None], 0), axis=(0, 1))


def _over_tokens(x: Array, plan: Plan) -> Array:
    """The sum over all ranks that route different tokens, equal on every device."""
    return whole(plan.sum(plan.sum(x, "token_time"), "token_rows"), plan)
