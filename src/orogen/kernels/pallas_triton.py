"""What kernels written for Pallas' Triton backend share: starting them, and tiles that overhang an array.

Triton's tiles have sizes that are powers of two; the part of a tile outside the array is masked.
"""

from collections.abc import Mapping

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = 1.4426950408889634
SMALLEST_TILE = 16  # of a matrix product in Triton


def require_gpu(*, interpret: bool, implementation: str = "triton") -> None:
    """Raises ValueError if there is no GPU to run a kernel on and it is not to be interpreted."""
    if not interpret and jax.default_backend() != "gpu":
        raise ValueError(
            f"implementation={implementation!r} needs a GPU and finds {jax.default_backend()!r}: expected another one "
            f"('{implementation}_interpreted' runs the same kernels there)"
        )


def tile(size: int) -> int:
    """The least power of two that holds `size` and that the hardware multiplies."""
    return max(SMALLEST_TILE, pl.next_power_of_2(size))


def inside(indices: Array, size: int, tile_size: int) -> Array | None:
    """Which of a tile's indices the array has; None, which costs nothing, if tiles fill it."""
    return indices < size if size % tile_size else None


def both(in_rows: Array | None, in_columns: Array | None) -> Array | None:
    """The mask of a matrix from those of its rows and columns."""
    if in_rows is None or in_columns is None:
        return in_columns if in_rows is None else in_rows[:, None]
    return in_rows[:, None] & in_columns[None, :]


def load(ref, mask: Array | None = None) -> Array:
    """What `ref` holds, 0 where masked out."""
    if mask is None:
        return plgpu.load(ref)
    zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=zero)


def store(ref, value: Array, mask: Array | None = None) -> None:
    """Writes `value`, in the type of `ref`, where it is not masked out."""
    value = jnp.asarray(value, ref.dtype)
    plgpu.store(ref, value, mask=None if mask is None else jnp.broadcast_to(mask, value.shape))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) by the hardware's power of two."""
    return 1.0 / (1.0 + jnp.exp2(x * -LOG2_E))


def dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The float32 product of two matrices over these axes."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def call(
    kernel,
    operands,
    in_specs,
    outputs,
    *,
    grid,
    warps: int,
    stages: int = 1,
    in_place: Mapping[str, int] | None = None,
    interpret: bool,
) -> dict[str, Array]:
    """The kernel's outputs by name, from their (shape, dtype, block).

    in_place: for an output that overwrites an operand, that operand's number. What no program stores stays as it was;
    the operand is copied first unless the caller gives it away (`donate_argnums`).
    """
    varying = jax.typeof(operands[0]).mat
    shapes = [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in outputs.values()]
    launch = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=[spec for _, _, spec in outputs.values()],
        out_shape=shapes,
        input_output_aliases={number: list(outputs).index(name) for name, number in (in_place or {}).items()},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
    )
    return dict(zip(outputs, launch(*operands), strict=True))
