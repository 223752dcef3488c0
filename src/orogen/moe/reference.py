"""A mixture of experts, slow and obvious: every expert processes every token, and the chosen outputs are added up.

Tests compare every dispatch with it, so it shares no code with router, dispatch, experts or layer.

Letters: b batch, t time, n tokens of one source rank in order, d model, w expert width, e experts, f hidden.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Weights(NamedTuple):
    """A layer's weights, None where the layer has none. bias_e is the correction bias, gate_bias_e is added to the
    logits; expert_gate_ewf and shared_gate_df gate hidden units, shared_scale_d1 gates the shared expert's output."""

    gate_de: Array
    bias_e: Array | None
    up_ewf: Array
    down_efw: Array
    latent_down_dw: Array | None = None
    latent_up_wd: Array | None = None
    shared_up_df: Array | None = None
    shared_down_fd: Array | None = None
    gate_bias_e: Array | None = None
    expert_gate_ewf: Array | None = None
    up_bias_ef: Array | None = None
    expert_gate_bias_ef: Array | None = None
    down_bias_ew: Array | None = None
    shared_gate_df: Array | None = None
    shared_scale_d1: Array | None = None


class Options(NamedTuple):
    """Experts per token, and how they are chosen and weighted. capacity: tokens that one expert takes, the first or,
    with heaviest, those with the largest weights; None: all. clamp: the limit of gpt-oss's gated form; None: a gated
    expert is SwiGLU."""

    k: int
    score: str = "sigmoid"
    clamp: float | None = None
    n_group: int = 1
    topk_group: int = 1
    normalise: bool = True
    scaling: float = 1.0
    capacity: int | None = None
    heaviest: bool = False


class Answer(NamedTuple):
    """The layer's output, assignments by expert before any was dropped, and how many were dropped."""

    y_nd: Array
    load_e: Array
    dropped: Array


def mixture(x_nd: Array, valid_n: Array, weights: Weights, options: Options) -> Answer:
    """The layer on the tokens of one source rank. Tokens that are not `valid_n` get only the shared expert's output."""
    logits_ne = x_nd @ weights.gate_de + (0 if weights.gate_bias_e is None else weights.gate_bias_e)
    scores_ne = {"sigmoid": jax.nn.sigmoid, "softmax": softmax, "softmax_topk": jnp.exp}[options.score](logits_ne)
    ranked_ne = (logits_ne if options.score == "softmax_topk" else scores_ne) + (
        0 if weights.bias_e is None else weights.bias_e
    )
    chosen_ne = jax.vmap(lambda ranked_e: choose(ranked_e, options))(ranked_ne)
    wanted_ne = chosen_ne & valid_n[:, None]
    share_ne = jnp.where(chosen_ne, scores_ne, 0)
    if options.normalise or options.score == "softmax_topk":
        # In logarithms, so that a single expert's share, which is 1 whatever its score, has a gradient of exactly 0.
        log_ne = jnp.log(jnp.where(chosen_ne, scores_ne, 1))
        share_ne = jnp.where(chosen_ne, jnp.exp(log_ne - jnp.log(share_ne.sum(1, keepdims=True))), 0)
    room = len(x_nd) if options.capacity is None else options.capacity
    if options.heaviest:
        queued_ne = jnp.where(wanted_ne, jax.lax.stop_gradient(share_ne), -1)
        kept_ne = wanted_ne & jax.vmap(lambda queued_n: largest(queued_n, room), 1, 1)(queued_ne)
    else:
        place_ne = jnp.cumsum(wanted_ne, 0)  # a token's position in the expert's queue, from 1
        kept_ne = wanted_ne & (place_ne <= room)
    u_nw = x_nd if weights.latent_down_dw is None else x_nd @ weights.latent_down_dw
    experts = Perceptron(
        weights.up_ewf, weights.down_efw, weights.expert_gate_ewf,
        weights.up_bias_ef, weights.expert_gate_bias_ef, weights.down_bias_ew,
    )  # fmt: skip
    answers_enw = jax.vmap(lambda expert: perceptron(u_nw, expert, clamp=options.clamp))(experts)
    y_nd = jnp.einsum("enw,ne->nw", answers_enw, jnp.where(kept_ne, share_ne * options.scaling, 0))
    y_nd = y_nd if weights.latent_up_wd is None else y_nd @ weights.latent_up_wd
    if weights.shared_up_df is not None and weights.shared_down_fd is not None:
        shared = Perceptron(weights.shared_up_df, weights.shared_down_fd, weights.shared_gate_df)
        answer_nd = perceptron(x_nd, shared, clamp=options.clamp)
        scale_d1 = weights.shared_scale_d1
        y_nd = y_nd + (answer_nd if scale_d1 is None else answer_nd * jax.nn.sigmoid(x_nd @ scale_d1))
    return Answer(y_nd, wanted_ne.sum(0), (wanted_ne & ~kept_ne).sum())


def choose(biased_e: Array, options: Options) -> Array:
    """Mask of the experts that one token goes to, from its biased scores."""
    groups_ge = biased_e.reshape(options.n_group, -1)
    best_two_g = jnp.where(jax.vmap(lambda e: largest(e, 2))(groups_ge), groups_ge, 0).sum(1)
    allowed_ge = jnp.broadcast_to(largest(best_two_g, options.topk_group)[:, None], groups_ge.shape)
    return largest(jnp.where(allowed_ge.reshape(-1), biased_e, -jnp.inf), options.k)


def largest(values_i: Array, count: int) -> Array:
    """Whether each value is among the `count` largest; ties go to the first."""
    i = jnp.arange(len(values_i))
    earlier_ij = i[None, :] < i[:, None]
    beaten_ij = (values_i[None, :] > values_i[:, None]) | (values_i[None, :] == values_i[:, None]) & earlier_ij
    return beaten_ij.sum(1) < count


def softmax(logits_ne: Array) -> Array:
    """exp(logit), each row divided by its sum."""
    return jnp.exp(logits_ne) / jnp.exp(logits_ne).sum(1, keepdims=True)


class Perceptron(NamedTuple):
    """The weights of one expert, or of several, stacked along a first axis."""

    up_wf: Array
    down_fw: Array
    gate_wf: Array | None = None
    up_bias_f: Array | None = None
    gate_bias_f: Array | None = None
    down_bias_w: Array | None = None


def perceptron(x_nw: Array, weights: Perceptron, *, clamp: float | None = None) -> Array:
    """down(relu(up x)²), or with a gate down(silu(gate x) · up x), or clamped down(g · σ(1.702 g) · (u + 1))."""
    plus = lambda y, bias: y if bias is None else y + bias  # noqa: E731
    up_nf = plus(x_nw @ weights.up_wf, weights.up_bias_f)
    if weights.gate_wf is None:
        return plus(jnp.maximum(up_nf, 0) ** 2 @ weights.down_fw, weights.down_bias_w)
    gate_nf = plus(x_nw @ weights.gate_wf, weights.gate_bias_f)
    if clamp is None:
        return plus((up_nf * gate_nf / (1 + jnp.exp(-gate_nf))) @ weights.down_fw, weights.down_bias_w)
    gate_nf = jnp.where(gate_nf > clamp, clamp, gate_nf)
    up_nf = jnp.where(up_nf > clamp, clamp, jnp.where(up_nf < -clamp, -clamp, up_nf))
    return plus((gate_nf / (1 + jnp.exp(-1.702 * gate_nf)) * (up_nf + 1)) @ weights.down_fw, weights.down_bias_w)


def balance_loss(x_td: Array, valid_t: Array, weights: Weights, options: Options) -> Array:
    """The balance loss of one sequence, e Σ_i f_i P_i: f_i is expert i's share of the k · t assignments that scores
    without bias make, P_i its mean share of a token's scores. Source: arXiv:2412.19437, eq. 17-20."""
    logits_te = x_td @ weights.gate_de + (0 if weights.gate_bias_e is None else weights.gate_bias_e)
    scores_te = jax.nn.sigmoid(logits_te) if options.score == "sigmoid" else softmax(logits_te)
    k = options.k
    chosen_te = jax.vmap(lambda scores_e: largest(scores_e, k))(scores_te) & valid_t[:, None]
    share_te = scores_te / scores_te.sum(1, keepdims=True) * valid_t[:, None]
    tokens = jnp.maximum(valid_t.sum(), 1)
    return scores_te.shape[1] * jnp.sum(chosen_te.sum(0) / (k * tokens) * share_te.sum(0) / tokens)


def z_loss(x_td: Array, valid_t: Array, weights: Weights) -> Array:
    """Σ over tokens of (log Σ_e exp logit_e)². Source: arXiv:2202.08906, eq. 5."""
    logits_te = x_td @ weights.gate_de + (0 if weights.gate_bias_e is None else weights.gate_bias_e)
    return jnp.sum(jnp.log(jnp.exp(logits_te).sum(1)) ** 2 * valid_t)
