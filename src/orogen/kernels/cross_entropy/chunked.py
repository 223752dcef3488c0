"""Cross-entropy in chunks of tokens; the gradient is computed along with the loss, so logits are computed once.

The loss is a scalar, so the backward pass only has to scale its gradient. Each chunk therefore adds its share while its
logits exist: three products, against four if the backward pass recomputed the logits, and no chunk saves anything.

Axes: n tokens (of one chunk inside a step), d model, v vocabulary of this rank, c chunks.
"""

from functools import partial

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.operands import Operands, Reduce
from orogen.kernels.cross_entropy.reference import SoftmaxParts, softmax_parts
from orogen.parallel.varying import vary_like


def cross_entropy_chunked(o: Operands, weights_n: Array, *, chunk: int, reduce: Reduce) -> Array:
    """See `cross_entropy`: never holds more than (chunk, v) logits, and computes them once.

    The head's gradient is summed over chunks in float32, so a differentiated call also holds one float32 (d, v).
    """
    return _loss(min(chunk, len(o.x_nd)), reduce, o, weights_n)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(chunk: int, reduce: Reduce, o: Operands, weights_n: Array) -> Array:
    """The loss alone, for a call that is not differentiated."""

    def step(_, tokens):
        part, weights_n = _of_chunk(o, tokens)
        return None, jnp.sum(weights_n * softmax_parts(part, reduce).loss_n)

    return jnp.sum(lax.scan(step, None, split((o.x_nd, o.columns_n, weights_n), chunk))[1])


def _forward(chunk, reduce, o, weights_n):
    """The loss, and its gradients for a cotangent of one."""

    def step(grad_head_dv, tokens):
        part, weights_n = _of_chunk(o, tokens)
        parts = softmax_parts(part, reduce)
        grad_x_nd, more_dv = _products(parts, weights_n, part)
        return grad_head_dv + more_dv, (jnp.sum(weights_n * parts.loss_n), grad_x_nd)

    grad_head_dv = vary_like(jnp.zeros(o.head_dv.shape, jnp.float32), o.head_dv)
    tokens = split((o.x_nd, o.columns_n, weights_n), chunk)
    grad_head_dv, (losses_c, grad_x_cnd) = lax.scan(step, grad_head_dv, tokens)
    grad_x_nd = grad_x_cnd.reshape(-1, o.x_nd.shape[1])[: len(o.x_nd)]
    return jnp.sum(losses_c), (grad_x_nd, grad_head_dv.astype(o.head_dv.dtype))


def _backward(chunk, reduce, gradients, cotangent):
    grad_x_nd, grad_head_dv = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradients)
    return Operands(grad_x_nd, grad_head_dv, None, None), None  # pyright: ignore[reportArgumentType]


_loss.defvjp(_forward, _backward)


def log_likelihoods_chunked(o: Operands, *, chunk: int, reduce: Reduce) -> Array:
    """See `log_likelihoods`: never holds more than (chunk, v) logits. The head's gradient is summed in float32."""
    return _log_likelihoods(min(chunk, len(o.x_nd)), reduce, o)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_likelihoods(chunk: int, reduce: Reduce, o: Operands) -> Array:
    def step(_, tokens):
        x_nd, columns_n = tokens
        return None, -softmax_parts(o._replace(x_nd=x_nd, columns_n=columns_n), reduce).loss_n

    return lax.scan(step, None, split((o.x_nd, o.columns_n), chunk))[1].reshape(-1)[: len(o.x_nd)]


def _log_likelihoods_forward(chunk, reduce, o):
    return _log_likelihoods(chunk, reduce, o), o


def _log_likelihoods_backward(chunk, reduce, o, cotangent_n):
    def step(grad_head_dv, tokens):
        part, cotangent_n = _of_chunk(o, tokens)
        grad_x_nd, more_dv = _products(softmax_parts(part, reduce), -cotangent_n, part)
        return grad_head_dv + more_dv, grad_x_nd

    grad_head_dv = vary_like(jnp.zeros(o.head_dv.shape, jnp.float32), o.head_dv)
    tokens = split((o.x_nd, o.columns_n, cotangent_n), chunk)
    grad_head_dv, grad_x_cnd = lax.scan(step, grad_head_dv, tokens)
    grad_x_nd = grad_x_cnd.reshape(-1, o.x_nd.shape[1])[: len(o.x_nd)]
    return (Operands(grad_x_nd, grad_head_dv.astype(o.head_dv.dtype), None, None),)  # pyright: ignore[reportArgumentType]


_log_likelihoods.defvjp(_log_likelihoods_forward, _log_likelihoods_backward)


def _products(parts: SoftmaxParts, weights_n: Array, o: Operands) -> tuple[Array, Array]:
    """The gradients of the weighted loss: x's in its dtype, the head's in float32."""
    likelihood_nv = parts.exp_nv / parts.total_n[:, None]
    grad_nv = weights_n[:, None] * (likelihood_nv - parts.hit_nv)
    # Products run in the inputs' dtype, like the model's own, and accumulate in float32.
    grad_x_nd = jnp.matmul(grad_nv.astype(o.head_dv.dtype), o.head_dv.T, preferred_element_type=jnp.float32)
    grad_head_dv = jnp.matmul(o.x_nd.T, grad_nv.astype(o.x_nd.dtype), preferred_element_type=jnp.float32)
    return grad_x_nd.astype(o.x_nd.dtype), grad_head_dv


def _of_chunk(o: Operands, tokens: tuple[Array, Array, Array]) -> tuple[Operands, Array]:
    """The operands of one chunk's tokens, and their weights or cotangents."""
    x_nd, columns_n, numbers_n = tokens
    return o._replace(x_nd=x_nd, columns_n=columns_n), numbers_n


def split(operands: tuple[Array, ...], chunk: int) -> tuple[Array, ...]:
    """Splits axis n into (c, n); the last chunk is padded with zeros, that is, with tokens of weight zero."""

    def pieces(a_n: Array) -> Array:
        padding = [(0, -len(a_n) % chunk), *[(0, 0)] * (a_n.ndim - 1)]
        return jnp.pad(a_n, padding).reshape(-1, chunk, *a_n.shape[1:])

    return jax.tree.map(pieces, operands)
