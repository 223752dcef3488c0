"""The divergence in chunks of tokens; the gradient is computed along with the loss, so logits are computed once.

As in `cross_entropy.chunked`: three products of the student, and one of a teacher that is there.
Axes: n tokens (of one chunk inside a step), d model, e teacher's model, v vocabulary of this rank, c chunks.
"""

from functools import partial
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.kernels.cross_entropy.chunked import split
from orogen.kernels.cross_entropy.operands import Operands, Reduce
from orogen.kernels.divergence.operands import Distilled, Hidden, Likely, Mix
from orogen.kernels.divergence.reference import Terms, terms
from orogen.parallel.varying import vary_like


def distilled_chunked(
    o: Operands, teacher: Hidden | Likely, first: Array | int, weights_n: Array, *, mix: Mix, chunk: int, reduce: Reduce
) -> Distilled:
    """See `distilled`: never holds more than (chunk, v) logits of each model, and computes them once.

    The head's gradient is summed over chunks in float32, so a differentiated call also holds one float32 (d, v).
    """
    return _sums(min(chunk, len(o.x_nd)), mix, reduce, o, teacher, first, weights_n)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(chunk: int, mix: Mix, reduce: Reduce, o: Operands, teacher: Any, first: Any, weights_n: Array) -> Distilled:
    """The sums alone, for a call that is not differentiated."""

    def step(_, tokens):
        part, known, weights_n = _of_chunk(o, teacher, tokens)
        return None, _weighed(terms(part, known, first, mix, reduce), weights_n, mix)

    return _total(lax.scan(step, None, split(_by_token(o, teacher, weights_n), chunk))[1])


def _forward(chunk, mix, reduce, o, teacher, first, weights_n):
    """The sums, and the gradients of the total for a cotangent of one."""

    def step(grad_head_dv, tokens):
        part, known, weights_n = _of_chunk(o, teacher, tokens)
        found = terms(part, known, first, mix, reduce)
        grad_nv = weights_n[:, None] * found.gradient_nv
        # Products run in the inputs' dtype, like the model's own, and accumulate in float32.
        grad_x_nd = jnp.matmul(grad_nv.astype(o.head_dv.dtype), o.head_dv.T, preferred_element_type=jnp.float32)
        more_dv = jnp.matmul(part.x_nd.T, grad_nv.astype(part.x_nd.dtype), preferred_element_type=jnp.float32)
        return grad_head_dv + more_dv, (_weighed(found, weights_n, mix), grad_x_nd.astype(o.x_nd.dtype))

    grad_head_dv = vary_like(jnp.zeros(o.head_dv.shape, jnp.float32), o.head_dv)
    grad_head_dv, (sums, grad_x_cnd) = lax.scan(step, grad_head_dv, split(_by_token(o, teacher, weights_n), chunk))
    grad_x_nd = grad_x_cnd.reshape(-1, o.x_nd.shape[1])[: len(o.x_nd)]
    return _total(sums), (grad_x_nd, grad_head_dv.astype(o.head_dv.dtype))


def _backward(chunk, mix, reduce, gradients, cotangent):
    grad_x_nd, grad_head_dv = jax.tree.map(lambda g: (cotangent.total * g).astype(g.dtype), gradients)
    return Operands(grad_x_nd, grad_head_dv, None, None), None, None, None  # pyright: ignore[reportArgumentType]


_sums.defvjp(_forward, _backward)


def _by_token(o: Operands, teacher: Hidden | Likely, weights_n: Array) -> tuple[Array, ...]:
    known = (teacher.x_ne,) if isinstance(teacher, Hidden) else tuple(teacher)
    return (o.x_nd, o.columns_n, weights_n, *known)


def _of_chunk(o: Operands, teacher: Hidden | Likely, tokens: tuple[Array, ...]) -> tuple[Operands, Any, Array]:
    """The operands, the teacher and the weights of one chunk's tokens."""
    x_nd, columns_n, weights_n, *known = tokens
    part = o._replace(x_nd=x_nd, columns_n=columns_n)
    return part, Hidden(known[0], teacher.head_ev) if isinstance(teacher, Hidden) else Likely(*known), weights_n


def _weighed(found: Terms, weights_n: Array, mix: Mix) -> Distilled:
    parts = jnp.sum(weights_n * found.divergence_n), jnp.sum(weights_n * found.cross_entropy_n)
    return Distilled(mix.divergence * parts[0] + mix.cross_entropy * parts[1], *parts)


def _total(sums_c: Distilled) -> Distilled:
    return Distilled(*(jnp.sum(part_c) for part_c in sums_c))
