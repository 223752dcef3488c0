"""Cross-entropy by chunks of tokens, whose gradient is computed beside the loss: logits are computed once.

The gradient of a scalar needs only scaling later, so each chunk adds its part while its logits exist: three
products, against four where the backward pass recomputes the logits, and nothing of a chunk is kept.

Axes: n tokens (inside a step, of one chunk), d model, v vocabulary of this rank, c chunks.
"""

from functools import partial

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.reference import Reduce, SoftmaxParts, softmax_parts
from orogen.parallel.varying import vary_like


def cross_entropy_chunked(
    x_nd: Array,
    head_dv: Array,
    columns_n: Array,
    weights_n: Array,
    present_v: Array | None,
    *,
    chunk: int,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> Array:
    """See `cross_entropy`: never holds more than (chunk, v) logits, and computes them once.

    The head's gradient is summed over chunks in float32, so a differentiated call holds one float32 (d, v) besides.
    """
    return _loss(x_nd, head_dv, columns_n, weights_n, present_v, min(chunk, len(x_nd)), reduce_max, reduce_sum)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _loss(x_nd, head_dv, columns_n, weights_n, present_v, chunk: int, reduce_max: Reduce, reduce_sum: Reduce) -> Array:
    """The loss alone, for a call that is not differentiated."""

    def step(_, operands):
        x_nd, columns_n, weights_n = operands
        parts = softmax_parts(x_nd, head_dv, columns_n, present_v, reduce_max, reduce_sum)
        return None, jnp.sum(weights_n * parts.loss_n)

    return jnp.sum(lax.scan(step, None, _split((x_nd, columns_n, weights_n), chunk))[1])


def _forward(x_nd, head_dv, columns_n, weights_n, present_v, chunk, reduce_max, reduce_sum):
    """The loss, and its gradients for a cotangent of one."""

    def step(grad_head_dv, operands):
        x_nd, columns_n, weights_n = operands
        parts = softmax_parts(x_nd, head_dv, columns_n, present_v, reduce_max, reduce_sum)
        grad_x_nd, more_dv = _products(parts, weights_n, x_nd, head_dv)
        return grad_head_dv + more_dv, (jnp.sum(weights_n * parts.loss_n), grad_x_nd)

    grad_head_dv = vary_like(jnp.zeros(head_dv.shape, jnp.float32), head_dv)
    operands = _split((x_nd, columns_n, weights_n), chunk)
    grad_head_dv, (losses_c, grad_x_cnd) = lax.scan(step, grad_head_dv, operands)
    grad_x_nd = grad_x_cnd.reshape(-1, x_nd.shape[1])[: len(x_nd)]
    return jnp.sum(losses_c), (grad_x_nd, grad_head_dv.astype(head_dv.dtype))


def _backward(chunk, reduce_max, reduce_sum, gradients, cotangent):
    grad_x_nd, grad_head_dv = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradients)
    return grad_x_nd, grad_head_dv, None, None, None


_loss.defvjp(_forward, _backward)


def log_likelihoods_chunked(
    x_nd: Array,
    head_dv: Array,
    columns_n: Array,
    present_v: Array | None,
    *,
    chunk: int,
    reduce_max: Reduce,
    reduce_sum: Reduce,
) -> Array:
    """See `log_likelihoods`: never holds more than (chunk, v) logits. The head's gradient is summed in float32."""
    return _log_likelihoods(x_nd, head_dv, columns_n, present_v, min(chunk, len(x_nd)), reduce_max, reduce_sum)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _log_likelihoods(x_nd, head_dv, columns_n, present_v, chunk: int, reduce_max: Reduce, reduce_sum: Reduce) -> Array:
    def step(_, operands):
        return None, -softmax_parts(operands[0], head_dv, operands[1], present_v, reduce_max, reduce_sum).loss_n

    return lax.scan(step, None, _split((x_nd, columns_n), chunk))[1].reshape(-1)[: len(x_nd)]


def _log_likelihoods_forward(x_nd, head_dv, columns_n, present_v, chunk, reduce_max, reduce_sum):
    found_n = _log_likelihoods(x_nd, head_dv, columns_n, present_v, chunk, reduce_max, reduce_sum)
    return found_n, (x_nd, head_dv, columns_n, present_v)


def _log_likelihoods_backward(chunk, reduce_max, reduce_sum, operands, cotangent_n):
    x_nd, head_dv, columns_n, present_v = operands

    def step(grad_head_dv, operands):
        x_nd, columns_n, cotangent_n = operands
        parts = softmax_parts(x_nd, head_dv, columns_n, present_v, reduce_max, reduce_sum)
        grad_x_nd, more_dv = _products(parts, -cotangent_n, x_nd, head_dv)
        return grad_head_dv + more_dv, grad_x_nd

    grad_head_dv = vary_like(jnp.zeros(head_dv.shape, jnp.float32), head_dv)
    grad_head_dv, grad_x_cnd = lax.scan(step, grad_head_dv, _split((x_nd, columns_n, cotangent_n), chunk))
    grad_x_nd = grad_x_cnd.reshape(-1, x_nd.shape[1])[: len(x_nd)]
    return grad_x_nd, grad_head_dv.astype(head_dv.dtype), None, None


_log_likelihoods.defvjp(_log_likelihoods_forward, _log_likelihoods_backward)


def _products(parts: SoftmaxParts, weights_n: Array, x_nd: Array, head_dv: Array) -> tuple[Array, Array]:
    """The gradients of the weighted loss: x's in its dtype, the head's in float32."""
    likelihood_nv = parts.exp_nv / parts.total_n[:, None]
    grad_nv = weights_n[:, None] * (likelihood_nv - parts.hit_nv)
    # Products take the inputs' dtype, as those of the model do, and sum in float32.
    grad_x_nd = jnp.matmul(grad_nv.astype(head_dv.dtype), head_dv.T, preferred_element_type=jnp.float32)
    grad_head_dv = jnp.matmul(x_nd.T, grad_nv.astype(x_nd.dtype), preferred_element_type=jnp.float32)
    return grad_x_nd.astype(x_nd.dtype), grad_head_dv


def _split(operands: tuple[Array, ...], chunk: int) -> tuple[Array, ...]:
    """Splits axis n into (c, n); the last chunk is padded with zeros, which are tokens of weight zero."""

    def split(a_n: Array) -> Array:
        padding = [(0, -len(a_n) % chunk), *[(0, 0)] * (a_n.ndim - 1)]
        return jnp.pad(a_n, padding).reshape(-1, chunk, *a_n.shape[1:])

    return jax.tree.map(split, operands)
