"""The experts that each token goes to, their weights, and how evenly experts are used.

Letters: b batch, t time of this rank, n tokens, d model, e experts, k experts per token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.kernels.quotient import quotient
from orogen.layers.linear import empty_columns, empty_first_row, linear_float32
from orogen.layers.parameter import buffer, normal, parameter
from orogen.parallel.plan import Plan

# Keeps a token whose scores all underflow from dividing by zero; the value is Hugging Face's and Megatron's.
EPSILON = 1e-20
# Up to this many comparisons, decoding on a GPU finds the largest scores by comparing all pairs: two small kernels,
# which take less time than a sort. On a CPU they take five times as long.
FEW = 2**18


class Routing(NamedTuple):
    """The choice of each token.

    experts: (…, k) int32; weights: (…, k) float32; scores: (…, e) float32, without bias: sigmoids, or the softmax over
    all experts. margin: (…) by how much the last of the router's own top k, or the last group, beat the best that was
    left out; infinite if none was. flipped: (…) whether a replayed choice differs from that top k.

    The margin is a difference of biased sigmoids; for softmax_topk, of biased logits; for softmax, of biased
    probabilities, divided by that of the last expert chosen, which makes it nearly a difference of logits however many
    experts there are.
    """

    experts: Array
    weights: Array
    scores: Array
    margin: Array
    flipped: Array


def route(
    logits_ne: Array,
    bias_e: Array | None,
    *,
    score: str,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalise: bool,
    scaling: float,
    experts_nk: Array | None = None,
    by_pairs: bool = False,
) -> Routing:
    """Top-k experts by score + bias; weights are the scores themselves. Float32 throughout.

    score: sigmoid of the logits, softmax over all experts, or softmax_topk, which chooses by the logits and weights by
    a softmax over the chosen ones. The correction bias, if any, affects only the choice. With n_group > 1, only the
    topk_group groups with the largest sum of their best two biased scores are eligible. Weights are divided by their
    sum if `normalise` (those of softmax_topk add up to one anyway), then multiplied by `scaling`. Ties go to the lower
    index. experts_nk: a choice to replay, where it is not negative. by_pairs: whether few scores are ranked by
    comparing all pairs, with the same result.
    Sources: arXiv:2408.15664 (bias), arXiv:2412.19437, eq. 12-16; arXiv:2401.04088, section 2.1 (softmax_topk).
    """
    logits_ne = logits_ne.astype(jnp.float32)
    scores_ne = jax.nn.sigmoid(logits_ne) if score == "sigmoid" else jax.nn.softmax(logits_ne, -1)
    weighing_ne = logits_ne if score == "softmax_topk" else scores_ne
    choice_ne = lax.stop_gradient(weighing_ne) + (0 if bias_e is None else bias_e)
    own_nk, margin_n = _choose(choice_ne, k, n_group, topk_group, by_pairs=by_pairs)
    chosen_nk: Any = checkpoint_name(own_nk, "routing")
    if experts_nk is not None:
        chosen_nk = jnp.where(experts_nk < 0, chosen_nk, experts_nk)
    flipped_n = jnp.any(jnp.sort(own_nk) != jnp.sort(chosen_nk), -1)
    weights_nk = jnp.take_along_axis(weighing_ne, chosen_nk, axis=-1)
    if score == "softmax":
        least_n = jnp.take_along_axis(lax.stop_gradient(scores_ne), own_nk, axis=-1).min(-1)
        margin_n = margin_n / (least_n + EPSILON)
    if score == "softmax_topk":
        weights_nk = jax.nn.softmax(weights_nk, -1)
    elif normalise:
        weights_nk = quotient(weights_nk, weights_nk.sum(-1, keepdims=True) + EPSILON)
    return Routing(chosen_nk, weights_nk * scaling, scores_ne, margin_n, flipped_n)


def _choose(choice_ne: Array, k: int, n_group: int, topk_group: int, *, by_pairs: bool) -> tuple[Array, Array]:
    """The top k (n, k) within each token's best groups, and the margin (n): the smaller of the experts' and groups'."""
    margin_n = jnp.full(choice_ne.shape[:-1], jnp.inf)
    if n_group > 1:
        grouped = choice_ne.reshape(*choice_ne.shape[:-1], n_group, -1)
        best_two = lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        groups, margin_n = _top(best_two, topk_group, by_pairs=by_pairs)
        kept = jax.nn.one_hot(groups, n_group, dtype=jnp.bool_).any(-2)
        # Not 0, which would beat a negative bias.
        choice_ne = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice_ne.shape)
    chosen_nk, margin_of_experts_n = _top(choice_ne, k, by_pairs=by_pairs)
    return chosen_nk, jnp.minimum(margin_n, margin_of_experts_n)


def _top(values_ni: Array, k: int, *, by_pairs: bool) -> tuple[Array, Array]:
    """Indices (n, k) of the k largest, ties going to the lower index, and by how much (n) the last of them beat the
    next."""
    count = min(k + 1, values_ni.shape[-1])
    if by_pairs and values_ni.size * values_ni.shape[-1] <= FEW:
        index = _by_pairs(values_ni, count)
        best = jnp.take_along_axis(values_ni, index, axis=-1)
    else:
        best, index = lax.top_k(values_ni, count)
    margin_n = best[..., k - 1] - best[..., k] if best.shape[-1] > k else jnp.full(best.shape[:-1], jnp.inf)
    return index[..., :k], margin_n


def _by_pairs(values_ni: Array, count: int) -> Array:
    """The indices of `lax.top_k`, from the rank of each value among all, found by comparing all pairs."""
    bits_ni = lax.bitcast_convert_type(values_ni, jnp.int32)
    order_ni = jnp.where(bits_ni < 0, bits_ni ^ 0x7FFFFFFF, bits_ni)  # as the floats compare, NaN included
    index = jnp.arange(values_ni.shape[-1], dtype=jnp.int32)
    mine, other = order_ni[..., :, None], order_ni[..., None, :]
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    rank_ni = jnp.sum(before, axis=-1, dtype=jnp.int32)
    held = rank_ni[..., None, :] == jnp.arange(count, dtype=jnp.int32)[:, None]
    return jnp.sum(jnp.where(held, index, 0), axis=-1)


class Balance(NamedTuple):
    """Sums over this rank's tokens, per expert (e), from which the balance loss of the global batch is computed.

    counts: assignments by plain top-k of the scores, without a gradient; mass: scores normalised over all experts,
    times the share of experts that are present.
    """

    counts: Array
    mass: Array


class RouterLosses(NamedTuple):
    """Sums over this rank, each still to be divided by a count: `balance` by sequences, `z` by tokens. With
    router_balance = 'global', `balance` is the input of `global_balance`."""

    balance: Array | Balance
    z: Array


def router_losses(
    logits_bte: Array,
    scores_bte: Array,
    valid_bt: Array,
    plan: Plan,
    *,
    k: int,
    balance: str = "row",
    present_e: Array | None = None,
) -> RouterLosses:
    """The sequence balance loss and the z-loss: the balance of whole sequences, summed over this rank's rows.

    balance = Σ over rows of e · Σ_i f_i P_i, where f_i is the share of the row's assignments that expert i gets by
    plain top-k of the scores (no bias), and P_i the mean of its score normalised over all experts (for both softmax
    forms the softmax over all of them). A sequence is a row of the batch, as in Megatron. With balance = "global", the
    whole batch takes its place, and the result is the input of `global_balance`. z = Σ over tokens of
    logsumexp(logits)². Padding does not count. present_e: see `Router.present`; e is then the number of experts
    present, and both losses are 0 if there are none. Sources: arXiv:2412.19437, eq. 17-20; arXiv:2202.08906, eq. 5.
    """
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits_bte, -1)) * valid_bt)
    valid_bt1 = valid_bt[..., None].astype(jnp.float32)
    n_experts = scores_bte.shape[-1]
    share_bte = quotient(scores_bte, scores_bte.sum(-1, keepdims=True) + EPSILON)
    _, chosen_btk = lax.top_k(lax.stop_gradient(scores_bte), k)
    counts_be = expert_counts(chosen_btk, valid_bt[..., None] & (chosen_btk >= 0), n_experts, axes=(1, 2))
    mass_be = (share_bte * valid_bt1).sum(1)
    if present_e is not None:  # n_experts times the mean is the number of experts present
        mass_be, z = mass_be * present_e.mean(), z * present_e.any()
    if balance == "global":
        return RouterLosses(Balance(counts_be.sum(0), mass_be.sum(0)), z)
    counts_be, mass_be, tokens_b1 = plan.sum((counts_be, mass_be, valid_bt1.sum(1)), "token_time")
    counts_be, tokens_b1 = checkpoint_name(counts_be, "routing"), jnp.maximum(tokens_b1, 1)
    return RouterLosses(n_experts * jnp.sum(counts_be * mass_be / (k * tokens_b1**2)), z)


def global_balance(counts: Array, mass: Array, tokens: Array, *, k: int) -> Array:
    """e · Σ_i f_i P_i of each layer, summed over layers, with f and P as in `router_losses` but over all `tokens` of
    the global batch.

    counts: (…, e) of the global batch. mass: (…, e) of a part of it, such as a microbatch; the result is that part's
    share of the loss, and the shares add up.
    """
    return counts.shape[-1] * jnp.sum(counts * mass) / (k * tokens**2)


def expert_counts(experts: Array, counted: Array, n_experts: int, *, axes: tuple[int, ...]) -> Array:
    """How often each expert occurs in `experts` (int) where `counted`, summed over `axes`; float32, exact below
    2^24."""
    hits = (experts[..., None] == jnp.arange(n_experts)) & counted[..., None]
    return hits.sum(axes, dtype=jnp.float32)


class Router(nnx.Module):
    """The gate and its bias, in float32 whatever the compute dtype, and the correction bias."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, experts = config.hidden_size, config.n_routed_experts
        self.gate = normal(rngs, (size, experts), ("embed", None), std=config.init_std, float32=True)
        self.gate_bias = parameter(jnp.zeros(experts), (None,)) if config.router_bias else None
        self.bias = buffer(jnp.zeros(experts), (None,)) if config.router_correction_bias else None
        self.score = config.router_score
        self.k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor

    def present(self, plan: Plan) -> Array | None:
        """Which experts (e) a submodel has (`Plan.nested`): those whose column of the gate is not zero, and none if the
        gate's first row is zero, which marks a removed layer. None: all of them."""
        if not plan.nested:
            return None
        return ~empty_columns(self.gate, plan) & ~empty_first_row(self.gate, plan)

    def __call__(self, x_btd: Array, plan: Plan, experts_btk: Array | None) -> tuple[Array, Routing]:
        """Logits (b, t, e) float32 and their routing. experts_btk: a choice to replay; see `route`."""
        logits_bte = linear_float32(x_btd, self.gate, plan)
        if self.gate_bias is not None:
            logits_bte = logits_bte + self.gate_bias[...]
        bias_e = None if self.bias is None else self.bias[...]
        if plan.nested:  # absent experts have no score, and are not chosen whatever their bias
            absent_e = jnp.where(empty_columns(self.gate, plan), -jnp.inf, 0)
            logits_bte, bias_e = logits_bte + absent_e, absent_e + (0 if bias_e is None else bias_e)
        logits_bte = checkpoint_name(logits_bte, "router")
        routing = route(
            logits_bte,
            bias_e,
            score=self.score,
            k=self.k,
            n_group=self.n_group,
            topk_group=self.topk_group,
            normalise=self.normalise,
            scaling=self.scaling,
            experts_nk=experts_btk,
            by_pairs=plan.decode_kernels == "triton",
        )
        return logits_bte, routing
