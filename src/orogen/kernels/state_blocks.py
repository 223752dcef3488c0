"""States of an SSM in 8 bits: whole numbers from -127 to 127 with one float32 scale per block of up to 128 numbers.

A block lies along the last axis, as in the int8 state caches of Nemotron 3 Ultra's report. Its scale is its largest
magnitude times the float32 nearest to 1/127. A number becomes scale times the whole number nearest to its quotient or,
given random bits, one of the two beside it, so that the expected result is the number itself (to 2^-24 of a step). A
block of zeros has the scale 0; one with a number that is not finite becomes NaN.

Letters: n numbers along the last axis, k blocks.
"""

from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax import numpy as jnp

from orogen.config.dtype import STATE_BLOCK as BLOCK

LARGEST = 127
# Written out, since XLA makes it of a division by a constant, but not everywhere.
INVERSE = np.float32(1) / np.float32(LARGEST)


class Blocks(NamedTuple):
    """values (…, n) int8 and scales (…, k) float32; the last block may be shorter."""

    values: Any  # typed for arrays and for their logical axes
    scales: Any

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Blocks":
        """A state of zeros."""
        return cls(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], count(shape[-1])), jnp.float32))


def count(size: int) -> int:
    """How many blocks so many numbers have."""
    return -(-size // BLOCK)


def encode(state: Array, bits: Array | None = None) -> Blocks:
    """The state (…, n) float32 in blocks. bits: random uint32 of its shape; None: to the nearest, ties to even."""
    parts = _split(state)
    scales = jnp.max(jnp.abs(parts), axis=-1) * INVERSE  # of NaN: NaN
    steps = parts / jnp.where(scales > 0, scales, 1)[..., None]
    if bits is None:
        whole = jnp.round(steps)
    else:
        uniform = (_split(bits) >> np.uint32(8)).astype(jnp.float32) * 2.0**-24
        whole = jnp.floor(steps) + (uniform < steps - jnp.floor(steps))
    # The quotient of the largest number may be one float32 above 127. What is not finite is in the scale.
    whole = jnp.where(jnp.isfinite(scales)[..., None], jnp.clip(whole, -LARGEST, LARGEST), 1)
    return Blocks(_joined(whole, state.shape).astype(jnp.int8), jnp.where(jnp.isfinite(scales), scales, jnp.nan))


def decode(blocks: Blocks) -> Array:
    """The state (…, n) float32."""
    parts = _split(blocks.values.astype(jnp.float32)) * blocks.scales[..., None]
    return _joined(parts, blocks.values.shape)


def opened(state: Any) -> Array:
    """A state as an array: blocks decoded, any other as it is."""
    return decode(state) if isinstance(state, Blocks) else state


def _split(x: Array) -> Array:
    """(…, k, 128): blocks, with zeros behind the last; or (…, 1, n) of fewer numbers."""
    size = x.shape[-1]
    if size <= BLOCK:
        return x[..., None, :]
    behind = [(0, 0)] * (x.ndim - 1) + [(0, count(size) * BLOCK - size)]
    return jnp.pad(x, behind).reshape(*x.shape[:-1], count(size), BLOCK)


def _joined(parts: Array, shape: tuple[int, ...]) -> Array:
    return parts.reshape(*shape[:-1], -1)[..., : shape[-1]]
