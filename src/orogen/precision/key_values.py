"""Keys and values in FP8: E4M3 with one static scale for all keys of a layer, and one for all values.

A number is stored as E4M3(x · s), rounded to nearest even, where s is the float32 nearest to 1 / scale; beyond ±448 it
saturates, and NaN stays NaN. It is read as value · scale, computed in float32 and cast to the compute dtype. The scales
are `k_scale` and `v_scale` of ModelOpt's checkpoints, as in vLLM. (XLA turns a division by a constant into a product,
but not everywhere, so it is written as a product here.) Not differentiable.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.config.recipe import Scales
from orogen.precision.fp8 import E4M3
from orogen.precision.rounding import FORMATS

FORM = FORMATS["e4m3"]


def stored(values: Sequence[Array], scales: Scales | None) -> tuple[Array, ...]:
    """Keys and values in their stored form. scales: None leaves them as they are."""
    if scales is None:
        return tuple(values)
    inverses = (np.float32(1) / np.float32(scale) for scale in scales)
    return tuple(_rounded(x.astype(jnp.float32) * by) for x, by in zip(values, inverses, strict=True))


def read(values: Sequence[Array], scales: Scales | None, dtype: Any) -> tuple[Array, ...]:
    """What `stored` keeps, in `dtype`."""
    if scales is None:
        return tuple(values)
    return tuple((x.astype(jnp.float32) * s).astype(dtype) for x, s in zip(values, scales, strict=True))


def _rounded(x: Array) -> Array:
    """x (float32) in E4M3. It is rounded to E4M3's grid first, so that the conversion is exact: without its newer
    fusion emitters, XLA:CPU converts through float16 and rounds twice."""
    x = jnp.clip(x, -FORM.largest, FORM.largest)
    exponent = ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF) - 127
    unit = jnp.maximum(exponent, FORM.lowest) - FORM.fraction  # exponent of the distance to the next number
    power = lambda e: lax.bitcast_convert_type((e + 127) << 23, jnp.float32)  # noqa: E731
    return (jnp.round(x * power(-unit)) * power(unit)).astype(E4M3)
