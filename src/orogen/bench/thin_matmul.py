"""The input projections of a Mamba layer for the few tokens of a decoding step, in 16 and 8 bits, at the sizes of R1.

Letters: b tokens, d model, f columns of z and of x, n columns of B and of C, h heads (the columns of dt).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.bench.layers import draws, errors_of_layers
from orogen.bench.operation import Operation, Shape, Work, not_finite
from orogen.bench.timing import Program, compiled
from orogen.kernels.pallas_triton import converts_e4m3
from orogen.kernels.thin_matmul import IMPLEMENTATIONS, Matrix, thin_matmul

# The weights of 8 layers are 338 MB, in 8 bits 169: more than a GPU's cache holds.
R1 = {"b": 1, "d": 2048, "f": 4096, "n": 1024, "h": 64, "layers": 8}
SHAPES: dict[str, Shape] = {"b1": R1, "b8": {**R1, "b": 8}, "b64": {**R1, "b": 64}, "b256": {**R1, "b": 256}}
PARTS = ("z", "x", "b", "c", "dt")


class Operands(NamedTuple):
    """Inputs (b, d) of each layer in bfloat16, and its matrices: in bfloat16, and in E4M3 with a scale per column."""

    rows: tuple[Array, ...]
    bfloat16: tuple[tuple[Matrix, ...], ...]
    float8: tuple[tuple[Matrix, ...], ...]


def columns(shape: Shape) -> tuple[int, ...]:
    """Of each matrix of a layer, in the order of PARTS."""
    return shape["f"], shape["f"], shape["n"], shape["n"], shape["h"]


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands."""
    draw_one, d, layers = draws(seed), shape["d"], range(shape["layers"])
    plain = lambda out: Matrix(draw_one(d, out).astype(jnp.bfloat16))  # noqa: E731
    eight = lambda out: Matrix(draw_one(d, out).astype(jnp.float8_e4m3fn), jnp.abs(draw_one(1, out)))  # noqa: E731
    return Operands(
        tuple(draw_one(shape["b"], d).astype(jnp.bfloat16) for _ in layers),
        tuple(tuple(map(plain, columns(shape))) for _ in layers),
        tuple(tuple(map(eight, columns(shape))) for _ in layers),
    )


def works(shape: Shape) -> dict[str, Work]:
    """Matrices, scales and inputs are read once, outputs are written once."""
    b, d, layers, out = shape["b"], shape["d"], shape["layers"], sum(columns(shape))
    flops, rows = 2.0 * layers * b * d * out, 2.0 * b * (d + out)
    return {
        "bfloat16": Work(flops, layers * (2.0 * d * out + rows)),
        "float8": Work(flops, layers * (d * out + 4.0 * out + rows)),
    }


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs: all projections of all layers. Without `float8` for `triton` on a GPU that cannot convert it."""
    del shape

    def product(rows: Any, layers: Any) -> tuple[tuple[Array, ...], ...]:
        return tuple(
            thin_matmul(each, matrices, implementation=implementation)
            for each, matrices in zip(rows, layers, strict=True)
        )

    made = {"bfloat16": compiled(product, operands.rows, operands.bfloat16)}
    if implementation != "triton" or converts_e4m3():
        made["float8"] = compiled(product, operands.rows, operands.float8)
    return made


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors against products in float32; each is the largest over layers."""
    del shape
    errors: dict[str, float] = {}
    for work, layers in results.items():
        of_layers = zip(operands.rows, getattr(operands, work), strict=True)
        errors |= errors_of_layers(work, PARTS, _exact, of_layers, tuple(zip(*layers, strict=True)))
    return {**errors, "not_finite": not_finite(results)}


@jax.jit
def _exact(rows: Array, matrices: tuple[Matrix, ...]) -> tuple[Array, ...]:
    return tuple(
        jnp.matmul(rows, m.values if m.scale is None else m.values * m.scale, precision=lax.Precision.HIGHEST)
        for m in matrices
    )


OPERATION = Operation(
    name="thin_matmul", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    check=check,
)  # fmt: skip
