"""The experts' grouped matrix product, in which each row is multiplied by its group's weight, and both gradients.

Letters: n rows, d width in, f width out, e groups, m rows of the largest group.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.bench.operation import Operation, Shape, Work, not_finite, relative_error
from orogen.bench.timing import Program, compiled
from orogen.config.checks import ConfigError
from orogen.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul

# empty: the number of groups without rows. nano: Nemotron-3 Nano's experts for 16,384 tokens; r1_up and r1_down: R1's.
SHAPES: dict[str, Shape] = {
    "nano": {"n": 98304, "d": 2688, "f": 1856, "e": 128, "empty": 0},
    "r1_up": {"n": 98304, "d": 2048, "f": 1024, "e": 64, "empty": 0},
    "r1_down": {"n": 98304, "d": 1024, "f": 2048, "e": 64, "empty": 0},
    "ragged": {"n": 98304, "d": 2688, "f": 1856, "e": 128, "empty": 32},
}
CHECKED_ROWS = 256  # drawn at random, in addition to the first and last row of each group


class Operands(NamedTuple):
    """Rows, weights and the outputs' gradient in bfloat16; int32 group sizes, on the device and on the host."""

    rows_nd: Array
    weights_edf: Array
    grad_nf: Array
    sizes_e: Array
    host_sizes_e: np.ndarray


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands. Rows choose their groups at random, so sizes are uneven; `empty` groups have no rows."""
    n, d, f, e = (shape[key] for key in "ndfe")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(e)[: _filled(shape)]
    sizes_e = np.bincount(rng.choice(chosen, n), minlength=e).astype(np.int32)
    keys = jax.random.split(jax.random.key(seed), 3)
    normal = lambda key, *size: jax.random.normal(key, size, jnp.bfloat16)  # noqa: E731
    weights_edf = normal(keys[1], e, d, f) * jnp.asarray(d**-0.5, jnp.bfloat16)
    return Operands(normal(keys[0], n, d), weights_edf, normal(keys[2], n, f), jnp.asarray(sizes_e), sizes_e)


def works(shape: Shape) -> dict[str, Work]:
    """2 n d f FLOPs each. The weights of empty groups are not read, but their gradient is written."""
    n, d, f, e = (shape[key] for key in "ndfe")
    outside, used = n * d + n * f, _filled(shape) * d * f
    each = [("forward", used), ("gradient_rows", used), ("gradient_weights", e * d * f)]
    return {name: Work(2.0 * n * d * f, 2.0 * (outside + weights)) for name, weights in each}


def _filled(shape: Shape) -> int:
    """The number of groups that may have rows. Raises ConfigError if none may."""
    if not 0 <= shape["empty"] < shape["e"]:
        raise ConfigError(f"empty={shape['empty']}; expected 0 or more, and fewer than e={shape['e']}")
    return shape["e"] - shape["empty"]


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs: the forward product and each gradient alone."""
    del shape
    rows_nd, weights_edf, grad_nf, sizes_e, _ = operands

    def forward(rows_nd: Array, weights_edf: Array, sizes_e: Array) -> Array:
        return grouped_matmul(rows_nd, weights_edf, sizes_e, implementation=implementation)

    def gradient_rows(rows_nd: Array, weights_edf: Array, sizes_e: Array, grad_nf: Array) -> Array:
        return jax.vjp(lambda rows: forward(rows, weights_edf, sizes_e), rows_nd)[1](grad_nf)[0]

    def gradient_weights(rows_nd: Array, weights_edf: Array, sizes_e: Array, grad_nf: Array) -> Array:
        return jax.vjp(lambda weights: forward(rows_nd, weights, sizes_e), weights_edf)[1](grad_nf)[0]

    inputs = (rows_nd, weights_edf, sizes_e)
    return {
        "forward": compiled(forward, *inputs),
        "gradient_rows": compiled(gradient_rows, *inputs, grad_nf),
        "gradient_weights": compiled(gradient_weights, *inputs, grad_nf),
    }


def peer(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """torch's `grouped_mm` on the same arrays."""
    del shape, implementation
    import torch  # pyright: ignore[reportMissingImports]

    from orogen.bench.torch_programs import to_torch, torch_program

    rows, weights, grad = (to_torch(array) for array in operands[:3])
    ends = torch.cumsum(to_torch(operands.sizes_e), 0).to(torch.int32)
    multiply = torch.nn.functional.grouped_mm
    return {
        "forward": torch_program(lambda: multiply(rows, weights, offs=ends)),
        "gradient_rows": torch_program(lambda: multiply(grad, weights.transpose(-2, -1), offs=ends)),
        "gradient_weights": torch_program(lambda: multiply(rows.t(), grad, offs=ends)),
    }


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors of outputs and of the rows' gradient against NumPy in float64, at the first and last row of each group and
    at CHECKED_ROWS others; and of the weights' gradient against float32 products, in every group."""
    sizes_e = operands.host_sizes_e
    ends_e = np.cumsum(sizes_e)
    between = np.random.default_rng(shape["n"]).integers(shape["n"], size=CHECKED_ROWS)
    filled = sizes_e > 0
    rows_r = np.unique(np.concatenate([between, ends_e[filled] - 1, (ends_e - sizes_e)[filled]]))
    group_r = np.searchsorted(ends_e, rows_r, side="right")
    x_rd, dy_rf = (_float64(array[rows_r]) for array in (operands.rows_nd, operands.grad_nf))
    out_rf, dx_rd = np.empty((len(rows_r), shape["f"])), np.empty((len(rows_r), shape["d"]))
    for group in np.unique(group_r):
        mine, weight_df = group_r == group, _float64(operands.weights_edf[group])
        out_rf[mine], dx_rd[mine] = x_rd[mine] @ weight_df, dy_rf[mine] @ weight_df.T
    return {
        "forward": relative_error(results["forward"][rows_r], out_rf),
        "gradient_rows": relative_error(results["gradient_rows"][rows_r], dx_rd),
        "gradient_weights": float(_weights_error(operands, results["gradient_weights"], most=int(sizes_e.max()))),
        "not_finite": not_finite(results),
    }


@functools.partial(jax.jit, static_argnames="most")
def _weights_error(operands: Operands, grad_edf: Array, *, most: int) -> Array:
    """The largest relative error of a group's weight gradient; infinite if an empty group's is not zero.

    most: rows of the largest group. Only one group's rows and product are held in float32 at a time.
    """
    rows_nd, _, grad_nf, sizes_e, _ = operands
    begins_e = jnp.cumsum(sizes_e) - sizes_e

    def error(group: tuple[Array, Array, Array]) -> Array:
        begin, size, grad_df = group
        first = jnp.minimum(begin, len(rows_nd) - most)
        index_m = first + jnp.arange(most)
        inside_m = (begin <= index_m) & (index_m < begin + size)
        rows_md, grad_mf = (lax.dynamic_slice_in_dim(a, first, most).astype(jnp.float32) for a in (rows_nd, grad_nf))
        exact_df = jnp.matmul(jnp.where(inside_m, rows_md.T, 0), grad_mf, precision=lax.Precision.HIGHEST)
        difference = jnp.linalg.norm(grad_df.astype(jnp.float32) - exact_df)
        return jnp.where(difference == 0, 0, difference / jnp.linalg.norm(exact_df))

    return jnp.max(lax.map(error, (begins_e, sizes_e, grad_edf)))


def _float64(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


OPERATION = Operation(
    name="grouped_matmul", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    peers=("grouped_mm",), peer=peer, check=check,
)  # fmt: skip
