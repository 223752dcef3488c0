"""Shared by the kernels for Pallas' Triton backend: launching, and masks for tiles that extend past an array.

The sizes of Triton's tiles are powers of two; the part of a tile outside the array is masked.
"""

import re
from collections.abc import Mapping

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from orogen.parallel.target import compute_capability, platform

LOG2_E = 1.4426950408889634
SMALLEST_TILE = 16  # the least size of a matrix product in Triton
E4M3_SINCE = 8, 9  # the compute capability from which Triton converts E4M3; below, it aborts the process


def require_gpu(*, interpret: bool, implementation: str = "triton", e4m3: bool = False) -> None:
    """Raises ValueError if there is no GPU, or with `e4m3` one whose kernels cannot read that, and `interpret` is
    False."""
    if not interpret and platform() != "gpu":
        raise ValueError(
            f"implementation={implementation!r} needs a GPU and finds {platform()!r}: expected another "
            f"implementation ('{implementation}_interpreted' runs the same kernels anywhere)"
        )
    if e4m3 and not interpret and not converts_e4m3():
        least, found = ".".join(map(str, E4M3_SINCE)), compute_capability()
        raise ValueError(
            f"implementation={implementation!r} reads E4M3 on GPUs of compute capability {least} or more, and this one "
            f"has {found}: expected another implementation, or numbers in the compute dtype"
        )


def converts_e4m3() -> bool:
    """Whether kernels can read E4M3 here: on a GPU from E4M3_SINCE on, and by the interpreter where there is no GPU."""
    capability = compute_capability()
    if capability is None:
        return True
    number = re.fullmatch(r"(\d+)\.(\d+)", str(capability))
    return number is not None and tuple(map(int, number.groups())) >= E4M3_SINCE


def tile(size: int) -> int:
    """The least power of two that covers `size` and that a matrix product accepts."""
    return max(SMALLEST_TILE, pl.next_power_of_2(size))


def inside(indices: Array, size: int, tile_size: int) -> Array | None:
    """Mask of the tile's indices that lie inside the array; None, which costs nothing, if tiles divide it evenly."""
    return indices < size if size % tile_size else None


def both(in_rows: Array | None, in_columns: Array | None) -> Array | None:
    """The mask of a matrix, from the masks of its rows and of its columns."""
    if in_rows is None or in_columns is None:
        return in_columns if in_rows is None else in_rows[:, None]
    return in_rows[:, None] & in_columns[None, :]


def load(ref, mask: Array | None = None) -> Array:
    """Loads `ref`; 0 where masked out."""
    if mask is None:
        return plgpu.load(ref)
    zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=zero)


def store(ref, value: Array, mask: Array | None = None) -> None:
    """Stores `value` in `ref`, cast to its dtype, except where masked out."""
    value = jnp.asarray(value, ref.dtype)
    plgpu.store(ref, value, mask=None if mask is None else jnp.broadcast_to(mask, value.shape))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) by the hardware's exp2."""
    return 1.0 / (1.0 + jnp.exp2(x * -LOG2_E))


def dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The float32 product of two matrices, contracted over these axes."""
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
    """Runs the kernel and returns its outputs by name.

    outputs: (shape, dtype, block) by name. in_place: for each output that overwrites an operand, that operand's index.
    Elements that no program stores keep their values; the operand is copied first unless the caller donates it
    (`donate_argnums`).
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
