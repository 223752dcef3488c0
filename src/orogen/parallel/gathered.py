"""Parameters gathered from the ranks that store them, and gradients scattered to these ranks."""

from functools import partial

import jax
from jax import Array, lax
from jax import numpy as jnp

from orogen.parallel.axes import MeshAxes


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(x: Array, axes: MeshAxes, dim: int) -> Array:
    """All pieces of `x`. Its gradient is summed over ranks in float32, whatever x's dtype is."""
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _forward(x: Array, axes: MeshAxes, dim: int) -> tuple[Array, None]:
    return gather_weight(x, axes, dim), None


def _backward(axes: MeshAxes, dim: int, _: None, g: Array) -> tuple[Array]:
    return (scatter_sum(g, axes, dim).astype(g.dtype),)


gather_weight.defvjp(_forward, _backward)


def scatter_sum(x: Array, axes: MeshAxes, dim: int) -> Array:
    """The sum of `x` over ranks, in float32; each keeps its piece of it along `dim`.

    Numbers of 16 bits travel as they are, since every rank adds up its pieces itself: half the bytes of a
    reduce-scatter in float32.
    """
    if x.dtype.itemsize >= 4:
        return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    ranks = lax.axis_size(axes)
    pieces = jnp.moveaxis(x.reshape(*x.shape[:dim], ranks, -1, *x.shape[dim + 1 :]), dim, 0)
    # In two dimensions, as `Plan.exchange` does.
    pieces_rn = lax.all_to_all(pieces.reshape(ranks, -1), axes, 0, 0, tiled=True)
    return jnp.sum(pieces_rn, axis=0, dtype=jnp.float32).reshape(pieces.shape[1:])
