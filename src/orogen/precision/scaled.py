"""Weights that stay in 8 bits in memory, and become numbers of the compute dtype where a product reads them.

Letters: d width in, f width out, g groups of neighbouring rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A weight (…, d, f) in E4M3, and its scales (…, g, f) in float32: one per column and group of d / g rows.

    Formats with a scale per matrix, per output channel or per block of rows are all of this form. It stands in a
    parameter in place of an array; leading axes may be those of repeated layers or of experts.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Its number of axes."""
        return self.values.ndim

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: Any) -> "Scaled":
        if index is not Ellipsis:
            raise ValueError(f"a weight in 8 bits at {index}; expected all of it")
        return self

    def decoded(self, x: Array) -> Array:
        """The weight in x's dtype, for a product with x: the float32 nearest to each product of number and scale."""
        # Zero, but XLA cannot know: the weight depends on x, so it is decoded when x is there. Otherwise XLA:CPU
        # decodes the weights of all layers before the loop over steps of decoding (observed with jax 0.10.1, in spite
        # of an optimization barrier), and the program holds all of them in float32.
        zero = (x.reshape(-1)[0] > jnp.inf).astype(jnp.uint8)
        bits = lax.bitcast_convert_type(self.values, jnp.uint8) | zero
        values, scale = lax.bitcast_convert_type(bits, self.values.dtype), self.scale
        *lead, d, f = values.shape
        grouped = values.astype(jnp.float32).reshape(*lead, scale.shape[-2], -1, f) * scale[..., :, None, :]
        return grouped.reshape(*lead, d, f).astype(x.dtype)


def weight_for(x: Array, weight: Any) -> Array:
    """A weight as a product with x reads it: decoded if it is in 8 bits."""
    return weight.decoded(x) if isinstance(weight, Scaled) else weight
