"""Attention of new tokens to the paged keys and values of their sequences, at the sizes of R1.

Letters: b batch, t new tokens, h query heads, g key heads, k head size, c tokens per sequence, s tokens per page, p
pages per sequence.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.bench.layers import draws, errors_of_layers
from orogen.bench.operation import Operation, Shape, Work, not_finite
from orogen.bench.timing import Program, compiled
from orogen.config.checks import ConfigError
from orogen.kernels.paged_attention import IMPLEMENTATIONS, paged_attention

R1 = {"b": 1, "t": 1, "h": 32, "g": 2, "k": 128, "c": 1024, "s": 64, "layers": 128}
SHAPES: dict[str, Shape] = {
    "b1": R1,
    "b64": {**R1, "b": 64, "layers": 2},
    "b256": {**R1, "b": 256, "layers": 1},
    "b1_long": {**R1, "c": 131072, "layers": 1},
    "b64_drafts": {**R1, "b": 64, "t": 4, "layers": 2},
}


class Operands(NamedTuple):
    """Per layer: queries, and the pools of keys and of values, in bfloat16. Int32 tables and lengths are shared."""

    layers: tuple[tuple[Array, Array, Array], ...]
    table_bp: Array
    length_b: Array


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands; the pages of the sequences lie in the pools in random order."""
    b, t, h, g, k, c, s, layers = (shape[key] for key in ("b", "t", "h", "g", "k", "c", "s", "layers"))
    draw_one, pages = draws(seed), -(-c // s)
    half = lambda *size: draw_one(*size).astype(jnp.bfloat16)  # noqa: E731
    table_bp = np.random.default_rng(seed).permutation(b * pages).reshape(b, pages)
    each = tuple((half(b, t, h, k), half(b * pages, s, g, k), half(b * pages, s, g, k)) for _ in range(layers))
    return Operands(each, jnp.asarray(table_bp, jnp.int32), jnp.full(b, c, jnp.int32))


def works(shape: Shape) -> dict[str, Work]:
    """Reads the keys and values of every token once; four FLOPs per visible pair, head and unit of the head size."""
    b, t, h, g, k, c, layers = (shape[key] for key in ("b", "t", "h", "g", "k", "c", "layers"))
    if t > c:
        raise ConfigError(f"t={t}; expected at most c={c}, the tokens of a sequence, new ones included")
    pairs = t * c - t * (t - 1) / 2
    return {"forward": Work(4.0 * layers * b * h * k * pairs, 2.0 * layers * b * (2 * c * g * k + 2 * t * h * k))}


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our program, over all layers."""

    def forward(layers: Any, table_bp: Array, length_b: Array) -> tuple[Array, ...]:
        return tuple(
            paged_attention(q, k, v, table_bp, length_b, scale=shape["k"] ** -0.5, implementation=implementation)
            for q, k, v in layers
        )

    return {"forward": compiled(forward, *operands)}


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors against the reference in float32; each is the largest over layers."""
    del shape
    layers = ((*arrays, operands.table_bp, operands.length_b) for arrays in operands.layers)
    errors = errors_of_layers("forward", ("y",), _exact, layers, (results["forward"],))
    return {**errors, "not_finite": not_finite(results)}


@jax.jit
def _exact(q: Array, k: Array, v: Array, table_bp: Array, length_b: Array) -> Array:
    return paged_attention(q, k, v, table_bp, length_b, scale=q.shape[-1] ** -0.5, implementation="reference")


OPERATION = Operation(
    name="paged_attention", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    check=check,
)  # fmt: skip
