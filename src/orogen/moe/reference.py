"""A mixture of experts, slow and obvious: every expert answers every token, and the chosen answers are added up.

Tests hold every dispatch against it, so it shares no code with router, dispatch, experts or layer.

Letters: b batch, t time, n tokens of one source rank in order, d model, w expert width, e experts, f hidden.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Weights(NamedTuple):
    """A layer's weights. Without a latent space or a shared expert, theirs are None."""

    gate_de: Array
    bias_e: Array
    up_ewf: Array
    down_efw: Array
    latent_down_dw: Array | None = None
    latent_up_wd: Array | None = None
    shared_up_df: Array | None = None
    shared_down_fd: Array | None = None


class Options(NamedTuple):
    """Experts a token, and how they are chosen and weighted. capacity: tokens that one expert takes; None is all."""

    k: int
    n_group: int = 1
    topk_group: int = 1
    normalise: bool = True
    scaling: float = 1.0
    capacity: int | None = None


class Answer(NamedTuple):
    """The layer's output, assignments by expert before any was dropped, and how many were dropped."""

    y_nd: Array
    load_e: Array
    dropped: Array


def mixture(x_nd: Array, valid_n: Array, weights: Weights, options: Options) -> Answer:
    """The layer on the tokens of one source rank. Tokens that are not `valid_n` get the shared expert's answer only."""
    scores_ne = jax.nn.sigmoid(x_nd @ weights.gate_de)
    chosen_ne = jax.vmap(lambda scores_e: choose(scores_e + weights.bias_e, options))(scores_ne)
    wanted_ne = chosen_ne & valid_n[:, None]
    place_ne = jnp.cumsum(wanted_ne, 0)  # of a token in the expert's queue, from 1
    kept_ne = wanted_ne & (place_ne <= (len(x_nd) if options.capacity is None else options.capacity))
    share_ne = jnp.where(chosen_ne, scores_ne, 0)
    if options.normalise:
        share_ne = share_ne / share_ne.sum(1, keepdims=True)
    u_nw = x_nd if weights.latent_down_dw is None else x_nd @ weights.latent_down_dw
    answers_enw = jax.vmap(lambda up_wf, down_fw: perceptron(u_nw, up_wf, down_fw))(weights.up_ewf, weights.down_efw)
    y_nd = jnp.einsum("enw,ne->nw", answers_enw, jnp.where(kept_ne, share_ne * options.scaling, 0))
    y_nd = y_nd if weights.latent_up_wd is None else y_nd @ weights.latent_up_wd
    if weights.shared_up_df is not None and weights.shared_down_fd is not None:
        y_nd = y_nd + perceptron(x_nd, weights.shared_up_df, weights.shared_down_fd)
    return Answer(y_nd, wanted_ne.sum(0), (wanted_ne & ~kept_ne).sum())


def choose(biased_e: Array, options: Options) -> Array:
    """Which experts one token goes to, by its biased scores."""
    groups_ge = biased_e.reshape(options.n_group, -1)
    best_two_g = jnp.where(jax.vmap(lambda e: largest(e, 2))(groups_ge), groups_ge, 0).sum(1)
    allowed_ge = jnp.broadcast_to(largest(best_two_g, options.topk_group)[:, None], groups_ge.shape)
    return largest(jnp.where(allowed_ge.reshape(-1), biased_e, -jnp.inf), options.k)


def largest(values_i: Array, count: int) -> Array:
    """Which of the values are among the `count` largest; of equal ones the first are."""
    i = jnp.arange(len(values_i))
    earlier_ij = i[None, :] < i[:, None]
    beaten_ij = (values_i[None, :] > values_i[:, None]) | (values_i[None, :] == values_i[:, None]) & earlier_ij
    return beaten_ij.sum(1) < count


def perceptron(x_nw: Array, up_wf: Array, down_fw: Array) -> Array:
    """down(relu(up x)²)."""
    return jnp.maximum(x_nw @ up_wf, 0) ** 2 @ down_fw


def balance_loss(x_td: Array, valid_t: Array, gate_de: Array, k: int) -> Array:
    """The balance loss of one sequence, e Σ_i f_i P_i: f_i is expert i's share of the k · t assignments that scores
    without bias make, P_i its mean share of a token's scores. Source: arXiv:2412.19437, eq. 17-20."""
    scores_te = jax.nn.sigmoid(x_td @ gate_de)
    chosen_te = jax.vmap(lambda scores_e: largest(scores_e, k))(scores_te) & valid_t[:, None]
    share_te = scores_te / scores_te.sum(1, keepdims=True) * valid_t[:, None]
    tokens = jnp.maximum(valid_t.sum(), 1)
    return scores_te.shape[1] * jnp.sum(chosen_te.sum(0) / (k * tokens) * share_te.sum(0) / tokens)


def z_loss(x_td: Array, valid_t: Array, gate_de: Array) -> Array:
    """Σ over tokens of (log Σ_e exp logit_e)². Source: arXiv:2202.08906, eq. 5."""
    return jnp.sum(jnp.log(jnp.exp(x_td @ gate_de).sum(1)) ** 2 * valid_t)
