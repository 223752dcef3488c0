"""The divergence of each token, with all logits at once, and its gradient with respect to the student's logits.

Axes: n tokens, v vocabulary of this rank, k tokens that the teacher finds most likely.
"""

from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.operands import Operands, Reduce
from orogen.kernels.divergence.operands import Distilled, Hidden, Likely, Mix


class Terms(NamedTuple):
    """Of each token, in nats. gradient_nv: of the mix, with respect to the student's logits."""

    divergence_n: Array
    cross_entropy_n: Array
    gradient_nv: Array


class _Softmax(NamedTuple):
    """Probabilities of this rank's columns, and the logarithm of the sum of exponentials over all ranks'."""

    probability_nv: Array
    log_total_n: Array


def terms(o: Operands, teacher: Hidden | Likely, first: Array | int, mix: Mix, reduce: Reduce) -> Terms:
    """The terms of each token. first: the number of this rank's first column."""
    logits_nv = jnp.matmul(o.x_nd, o.head_dv, preferred_element_type=jnp.float32)
    hit_nv = o.columns_n[:, None] == jnp.arange(o.head_dv.shape[1])
    student = _softmax(logits_nv, o.present_v, reduce)
    target_n = reduce.sum(jnp.sum(jnp.where(hit_nv, logits_nv, 0.0), axis=1))
    if isinstance(teacher, Hidden):
        divergence_n, gradient_nv = _from_hidden(logits_nv, student, o.present_v, teacher, mix, reduce)
    else:
        divergence_n, gradient_nv = _from_likely(logits_nv, student, teacher, first, mix, reduce)
    gradient_nv = mix.divergence * gradient_nv + mix.cross_entropy * (student.probability_nv - hit_nv)
    return Terms(divergence_n, student.log_total_n - target_n, gradient_nv)


def distilled_reference(
    o: Operands, teacher: Hidden | Likely, first: Array | int, weights_n: Array, *, mix: Mix, chunk: int, reduce: Reduce
) -> Distilled:
    """See `distilled`: holds (n, v) logits, leaves the gradient to jax, and ignores `chunk`."""
    found = terms(o, teacher, first, mix, reduce)
    parts = jnp.sum(weights_n * found.divergence_n), jnp.sum(weights_n * found.cross_entropy_n)
    return Distilled(mix.divergence * parts[0] + mix.cross_entropy * parts[1], *parts)


def _softmax(logits_nv: Array, present_v: Array | None, reduce: Reduce) -> _Softmax:
    """Over all ranks' columns, without those that are padding."""
    if present_v is not None:
        logits_nv = jnp.where(present_v, logits_nv, -jnp.inf)
    max_n = reduce.max(lax.stop_gradient(jnp.max(logits_nv, axis=1)))
    exp_nv = jnp.exp(logits_nv - max_n[:, None])
    total_n = reduce.sum(jnp.sum(exp_nv, axis=1))
    return _Softmax(exp_nv / total_n[:, None], jnp.log(total_n) + max_n)


def _from_hidden(
    logits_nv: Array, student: _Softmax, present_v: Array | None, teacher: Hidden, mix: Mix, reduce: Reduce
) -> tuple[Array, Array]:
    """Σ_v p_v (log p_v - log q_v), p the teacher's softmax and q the student's, both at the temperature."""
    cold_nv = jnp.matmul(teacher.x_ne, teacher.head_ev, preferred_element_type=jnp.float32) / mix.temperature
    known = _softmax(cold_nv, present_v, reduce)
    tempered = student
    if mix.temperature != 1:
        logits_nv = logits_nv / mix.temperature
        tempered = _softmax(logits_nv, present_v, reduce)
    # Padding has probability 0, and finite logits here.
    apart_n = reduce.sum(jnp.sum(known.probability_nv * (cold_nv - logits_nv), axis=1))
    divergence_n = apart_n - known.log_total_n + tempered.log_total_n
    return divergence_n, (tempered.probability_nv - known.probability_nv) / mix.temperature


def _from_likely(
    logits_nv: Array, student: _Softmax, teacher: Likely, first: Array | int, mix: Mix, reduce: Reduce
) -> tuple[Array, Array]:
    """The same over the k tokens, both renormalised to them, or over these and one for all others: then the gradient is
    q - p of the k tokens and q (1 - rest of p / rest of q) of the others."""
    columns = logits_nv.shape[1]
    column_nk = teacher.ids_nk - first
    here_nk = (column_nk >= 0) & (column_nk < columns)
    column_nk = jnp.where(here_nk, column_nk, columns)  # out of range: dropped where it is written
    row_n1 = jnp.arange(len(logits_nv))[:, None]
    found_nk = logits_nv[row_n1, jnp.where(here_nk, column_nk, 0)]
    logits_nk = reduce.sum(jnp.where(here_nk, found_nk, 0.0))
    spread = lambda x_nk: jnp.zeros_like(logits_nv).at[row_n1, column_nk].add(x_nk, mode="drop")  # noqa: E731
    if mix.rest == "renormalize":
        known_nk = jax.nn.log_softmax(teacher.log_nk / mix.temperature)
        guessed_nk = jax.nn.log_softmax(logits_nk / mix.temperature)
        divergence_n = jnp.sum(jnp.exp(known_nk) * (known_nk - guessed_nk), axis=1)
        return divergence_n, spread(jnp.exp(guessed_nk) - jnp.exp(known_nk)) / mix.temperature
    known_nk = jnp.exp(teacher.log_nk)
    # Log-probabilities that were rounded may add up to more than one.
    rest_n = jnp.maximum(1 - jnp.sum(known_nk, axis=1), 0)
    outside_nv = jnp.ones(logits_nv.shape, bool).at[row_n1, column_nk].set(False, mode="drop")
    others_n = reduce.sum(jnp.sum(jnp.where(outside_nv, student.probability_nv, 0), axis=1))
    tiny = jnp.finfo(jnp.float32).tiny
    others_n, log_rest_n = jnp.maximum(others_n, tiny), jnp.log(jnp.maximum(rest_n, tiny))
    apart_nk = teacher.log_nk - (logits_nk - student.log_total_n[:, None])
    divergence_n = jnp.sum(known_nk * apart_nk, axis=1) + rest_n * (log_rest_n - jnp.log(others_n))
    kept_n = jnp.sum(known_nk, axis=1) + rest_n
    scale_nv = kept_n[:, None] - jnp.where(outside_nv, (rest_n / others_n)[:, None], 0)
    return divergence_n, student.probability_nv * scale_nv - spread(known_nk)
