"""How a slot stores the state of an SSM from piece to piece: in float32, in float16, or in blocks of int8 with scales.

All kernels take float32 states, and float16 states that they round stochastically themselves; kernels for one token
also take int8 blocks. Any other form is decoded before and encoded after a kernel, but only for rows with tokens: a
state that no token changes stays the same bit for bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.kernels.state_blocks import Blocks, encode, opened
from orogen.kernels.state_update.reference import bits_of
from orogen.layers.documents import Documents
from orogen.parallel.plan import Plan

Run = Callable[[Any, Array | None], tuple[Any, Any]]


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """A state of zeros, stored as `dtype`."""
    return Blocks.zeros(shape) if jnp.dtype(dtype) == jnp.int8 else jnp.zeros(shape, dtype)


def axes(names: tuple[str | None, ...], dtype: Any) -> Any:
    """The logical axes of `empty`, from those of the state, whose last one is never split."""
    return Blocks(names, (*names[:-1], None)) if jnp.dtype(dtype) == jnp.int8 else names


def updated(
    state: Any, run: Run, *, seeds_b2: Array | None, rows_b: Array, in_blocks: bool = False
) -> tuple[Any, Any]:  # fmt: skip
    """The result of `run`, and the state after it in the form of `state`.

    run: (state, seeds) -> result, new state; it rounds a float16 state by the seeds if it gets any. seeds_b2: see
    `seeds_of`. rows_b: which rows have tokens. in_blocks: whether `run` also takes int8 blocks and rounds them.
    """
    blocks = isinstance(state, Blocks)
    if (in_blocks and seeds_b2 is not None) or (not blocks and (state.dtype != jnp.float16 or seeds_b2 is not None)):
        return run(state, seeds_b2)
    found, new = run(opened(state).astype(jnp.float32), None)
    if not blocks:
        return found, new.astype(jnp.float16)
    stored = encode(new, None if seeds_b2 is None else bits_of(new, seeds_b2))
    return found, jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(rows_b, range(1, a.ndim)), a, b), stored, state)


def seeds_of(state: Any, rates: Array, docs: Documents, plan: Plan) -> Array | None:
    """The seeds of stochastic rounding, uint32 (b, 2): a word computed from the layer's decay rates, which differ
    between layers, and the position of the piece's first token. So equal texts are rounded alike, whatever their slot.
    None for a float32 state, and if the recipe rounds to nearest."""
    whole = not isinstance(state, Blocks) and state.dtype == jnp.float32
    if whole or not plan.recipe.stored.random_states:
        return None
    layer = lax.bitcast_convert_type(jnp.sum(rates, dtype=jnp.float32), jnp.uint32)
    position_b = docs.positions_bt[:, 0].astype(jnp.uint32)
    return jnp.stack([jnp.broadcast_to(layer, position_b.shape), position_b], axis=1)
