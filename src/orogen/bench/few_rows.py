"""The experts' up and down projections for the few tokens of a decoding step, at the sizes of R1.

Letters: b tokens, k experts per token, d model, f hidden, e experts, n assignments (of a token to an expert).
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
from orogen.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul

# For one token each layer reads six experts; 16 layers read most of the 64, more than a GPU's cache holds.
R1 = {"b": 1, "k": 6, "d": 2048, "f": 1024, "e": 64, "layers": 16}
SHAPES: dict[str, Shape] = {
    "b1": R1,
    "b8": {**R1, "b": 8, "layers": 4},
    "b64": {**R1, "b": 64, "layers": 2},
    "b256": {**R1, "b": 256, "layers": 2},
}


class Operands(NamedTuple):
    """Inputs (n, d) and (n, f) of each layer, and both weights, which the layers share, in bfloat16. sizes: int32
    assignments per expert (e,), by layer."""

    rows: tuple[tuple[Array, Array], ...]
    up_edf: Array
    down_efd: Array
    sizes: tuple[Array, ...]


def choices(shape: Shape) -> list[np.ndarray]:
    """Assignments per expert (e,), by layer. Each token chooses k experts at random, the same ones for every seed, so
    that the bytes are known. Raises ConfigError."""
    b, k, e, layers = (shape[key] for key in ("b", "k", "e", "layers"))
    if k > e:
        raise ConfigError(f"k={k}; expected at most e={e}")
    rng = np.random.default_rng(0)
    chosen = [np.concatenate([rng.permutation(e)[:k] for _ in range(b)]) for _ in range(layers)]
    return [np.bincount(experts, minlength=e).astype(np.int32) for experts in chosen]


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands."""
    n, d, f, e = shape["b"] * shape["k"], shape["d"], shape["f"], shape["e"]
    draw_one = draws(seed)
    half = lambda *size: draw_one(*size).astype(jnp.bfloat16)  # noqa: E731
    sizes = tuple(map(jnp.asarray, choices(shape)))
    return Operands(tuple((half(n, d), half(n, f)) for _ in sizes), half(e, d, f), half(e, f, d), sizes)


def works(shape: Shape) -> dict[str, Work]:
    """The weights of each expert that has an assignment are read once, as are inputs; outputs are written once."""
    n, d, f, layers = shape["b"] * shape["k"], shape["d"], shape["f"], shape["layers"]
    used = sum(int((sizes_e > 0).sum()) for sizes_e in choices(shape))
    one = Work(2.0 * layers * n * d * f, 2.0 * (used * d * f + layers * n * (d + f)))
    return {"up": one, "down": one}


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs: each product, over all layers."""
    del shape

    def product(rows: Any, weights: Array, sizes: Any) -> tuple[Array, ...]:
        return tuple(
            grouped_matmul(each, weights, sizes_e, implementation=implementation)
            for each, sizes_e in zip(rows, sizes, strict=True)
        )

    up, down = zip(*operands.rows, strict=True)
    return {
        "up": compiled(product, up, operands.up_edf, operands.sizes),
        "down": compiled(product, down, operands.down_efd, operands.sizes),
    }


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors against masked products in float32; each is the largest over layers."""
    del shape
    errors: dict[str, float] = {}
    for number, (work, weights) in enumerate((("up", operands.up_edf), ("down", operands.down_efd))):
        layers = ((rows[number], weights, sizes) for rows, sizes in zip(operands.rows, operands.sizes, strict=True))
        errors |= errors_of_layers(work, ("y",), _exact, layers, (results[work],))
    return {**errors, "not_finite": not_finite(results)}


@jax.jit
def _exact(rows: Array, weights: Array, sizes_e: Array) -> Array:
    return grouped_matmul(rows, weights, sizes_e, implementation="reference")


OPERATION = Operation(
    name="few_rows", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    check=check,
)  # fmt: skip
