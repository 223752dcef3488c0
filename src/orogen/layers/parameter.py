"""Parameters, and buffers, with their logical axis names and their initial values."""

import jax
import jax.numpy as jnp
from flax import nnx


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, std: float, **metadata
) -> nnx.Param:
    """A float32 parameter drawn from N(0, std²). metadata: see `parameter`."""
    return parameter(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes, **metadata)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, bound: float) -> nnx.Param:
    """A float32 parameter drawn from U(-bound, bound)."""
    return parameter(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound), axes)


def parameter(value: jax.Array, axes: tuple[str | None, ...], *, float32: bool = False) -> nnx.Param:
    """A parameter with one logical axis name (or None) per dimension.

    float32: it keeps its dtype when weights are cast for computation; a vector always does.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"axes {axes} for shape {value.shape}; expected one name per dimension")
    return nnx.Param(value, axes=axes, float32=float32 or value.ndim == 1)


def buffer(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Variable:
    """State without gradient or weight decay."""
    return nnx.Variable(value, axes=axes)
