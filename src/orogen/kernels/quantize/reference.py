"""Rounding to 8 bits as XLA does it."""

from typing import Any

from jax import Array
from jax import numpy as jnp


def quantize_plain(parts: tuple[Array, ...], scale: Array, kind: Any) -> tuple[Array, Array]:
    """See `quantize`."""
    x_nf = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    rounded_nf = (x_nf.astype(jnp.float32) / scale).astype(kind)
    return rounded_nf, rounded_nf.T
