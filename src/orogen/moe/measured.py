"""What routed experts tell of their importance and of their hidden units', for pruning.

Letters: b batch, t time of the tokens that this rank routes, n tokens (b · t), k experts per token, e experts, r rows
sorted by expert, w expert width, f hidden.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.layers.probe import whole
from orogen.moe.dispatch import DISPATCHES
from orogen.moe.router import Routing, expert_counts
from orogen.parallel.plan import Plan


def expert_statistics(
    routing: Routing, keep_btk: Array, results: tuple[Array, Array], group_sizes: Any, plan: Plan, *, n_experts: int,
    capacity: int,
) -> dict[str, Array]:  # fmt: skip
    """Sums over the batch's assignments to each expert, float32: `expert_count`, `expert_weight` (of the router) and
    `expert_output`, the L2 norm of the weighted output, all (e); and `expert_width` (e, f), the square of the mean of
    |hidden unit| over the expert's assignments.

    results: of the experts, (r, w) and their hidden units (r, f), for rows as the plan's dispatch returned them.
    keep_btk: the assignments that were sent. Raises ValueError for rows that name their experts.
    """
    if isinstance(group_sizes, RowGroups):
        raise ValueError("rows that name their experts cannot be measured; expected more tokens, sorted by expert")
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    experts_nk, weights_nk, keep_nk = flat(routing.experts), flat(routing.weights), flat(keep_btk)
    # Each row's router weight, which its expert's rank does not know: the token's weights and choices travel like the
    # token itself, in float32, which is exact for so many experts. Rows of no token are zero.
    told = [weights_nk, experts_nk, jnp.ones((len(experts_nk), 1))]
    sent = jnp.concatenate([a.astype(jnp.float32) for a in told], axis=-1), experts_nk, keep_nk
    found_rc, _, _ = DISPATCHES[plan.config.dispatch].dispatch(*sent, plan, n_experts=n_experts, capacity=capacity)
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
    """The local expert (r) of each row; past the last one for rows of none."""
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
    return whole(plan.sum(plan.sum(x, "token_time"), "token_rows"), plan)
