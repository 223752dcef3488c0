"""The dtype that a model computes in: float32 master parameters, and working copies cast to a named dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from orogen.config.dtype import COMPUTE

DTYPES = {name: jnp.dtype(name) for name in COMPUTE}


def working_copy(params: nnx.State, dtype: str) -> nnx.State:
    """`params` cast to `dtype`, except those marked float32: vectors (norms, D, biases), A_log and the router's gate,
    for which rounding to bfloat16 would change decays and routing."""

    def cast(leaf: Any) -> Any:
        return leaf if leaf.get_metadata()["float32"] else leaf.replace(leaf.get_value().astype(DTYPES[dtype]))

    return jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
