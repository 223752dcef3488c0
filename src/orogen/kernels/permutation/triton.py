"""The permutation of rows in Triton kernels, for NVIDIA GPUs: each token is read once, with all its rows.

Axes: n tokens, k choices per token, r rows of the copies, d width.

Two kernels, each the other's gradient: `spread` writes a token, times a weight per assignment, to the rows of its k
assignments; `collect` adds up those rows, times the weights. A row belongs to at most one assignment, so no two
programs write the same row; rows without an assignment are zeroed on the way.

Tiling: one program per token. It walks over the width in pieces of COLUMNS elements and, per piece, over the k rows of
the token. In `spread` it also zeroes the rows without an assignment among an equal share of all rows.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import call, inside, load, require_gpu, store
from orogen.kernels.traced import traced_once

COLUMNS = 1024  # per load: 16 bytes per thread for two-byte elements
WARPS = 4
WIDE = ("x", "other", "rows", "y")  # the arrays of width d


def take_rows_triton(x_nd: Array, slots_nk: Array, source_r: Array, *, interpret: bool = False) -> Array:
    """`take_rows` on an NVIDIA GPU; `interpret` runs the same kernels anywhere, slowly.

    Raises ValueError if there is no GPU and `interpret` is False.
    """
    require_gpu(interpret=interpret)
    return _take_rows(interpret, x_nd, slots_nk, source_r)  # pyright: ignore[reportReturnType]


def sum_rows_triton(rows_rd: Array, w_nk: Array, slots_nk: Array, source_r: Array, *, interpret: bool = False) -> Array:
    """`sum_rows` on an NVIDIA GPU, as `take_rows_triton`."""
    require_gpu(interpret=interpret)
    return _sum_rows(interpret, rows_rd, w_nk, slots_nk, source_r)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take_rows(interpret: bool, x_nd: Array, slots_nk: Array, source_r: Array) -> Array:
    return _take_rows_forward(interpret, x_nd, slots_nk, source_r)[0]


def _take_rows_forward(interpret, x_nd, slots_nk, source_r):
    return _spread(x_nd, None, None, slots_nk, source_r, interpret=interpret)["rows"], slots_nk


def _take_rows_backward(interpret, slots_nk, g_rd):
    return _collect(g_rd, None, slots_nk, interpret=interpret), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_rows(interpret: bool, rows_rd: Array, w_nk: Array, slots_nk: Array, source_r: Array) -> Array:
    return _sum_rows_forward(interpret, rows_rd, w_nk, slots_nk, source_r)[0]


def _sum_rows_forward(interpret, rows_rd, w_nk, slots_nk, source_r):
    kept = checkpoint_name(rows_rd, "expert_out"), w_nk, slots_nk, source_r
    return _collect(rows_rd, w_nk, slots_nk, interpret=interpret), kept


def _sum_rows_backward(interpret, residuals, g_nd):
    rows_rd, w_nk, slots_nk, source_r = residuals
    results = _spread(g_nd, w_nk, rows_rd, slots_nk, source_r, interpret=interpret)
    return results["rows"], results["products"].astype(w_nk.dtype), None, None


_sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)


@traced_once("interpret")
def _spread(
    x_nd: Array, w_nk: Array | None, other_rd: Array | None, slots_nk: Array, source_r: Array, *, interpret: bool
) -> dict[str, Array]:
    """rows (r, d), in x's dtype: w · x of each row's token. With `other_rd` also products (n, k), float32: for each
    assignment, the dot product of its row in `other_rd` with its token's x."""
    tokens, width = x_nd.shape
    outputs: dict[str, Any] = {"rows": ((len(source_r), width), x_nd.dtype)}
    if other_rd is not None:
        outputs["products"] = (slots_nk.shape, jnp.float32)
    operands = {"x": x_nd, "w": w_nk, "other": other_rd, "slots": slots_nk, "source": source_r}
    return _call(_spread_kernel, operands, outputs, tokens=tokens, interpret=interpret)


@traced_once("interpret")
def _collect(rows_rd: Array, w_nk: Array | None, slots_nk: Array, *, interpret: bool) -> Array:
    """y_n = Σ_k w · rows[slots_nk], in the rows' dtype; w is 1 if None."""
    operands = {"rows": rows_rd, "w": w_nk, "slots": slots_nk}
    outputs = {"y": ((len(slots_nk), rows_rd.shape[1]), rows_rd.dtype)}
    return _call(_collect_kernel, operands, outputs, tokens=len(slots_nk), interpret=interpret)["y"]


def _call(kernel, operands: dict[str, Any], outputs: dict[str, Any], *, tokens: int, interpret: bool):
    operands = {name: array for name, array in operands.items() if array is not None}
    width = next(array.shape[1] for name, array in operands.items() if name in WIDE)
    size = min(COLUMNS, pl.next_power_of_2(width))

    def whole(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        shape = (shape[0], pl.cdiv(width, size) * size) if name in WIDE else shape
        return pl.BlockSpec(shape, lambda n: (0,) * len(shape))

    return call(
        functools.partial(kernel, names=(*operands, *outputs), width=width, size=size),
        list(operands.values()),
        [whole(name, array.shape) for name, array in operands.items()],
        {name: (shape, dtype, whole(name, shape)) for name, (shape, dtype) in outputs.items()},
        grid=(tokens,),
        warps=WARPS,
        interpret=interpret,
    )


def _parts(width: int, size: int) -> list[tuple[Any, Array | None]]:
    """The slices of a row that are loaded one at a time, each with its mask."""
    return [(pl.ds(at, size), inside(at + jnp.arange(size), width, size)) for at in range(0, width, size)]


def _where(mask: Array | None, condition: Array, size: int) -> Array:
    condition_d = jnp.broadcast_to(condition, (size,))
    return condition_d if mask is None else condition_d & mask


def _spread_kernel(*refs, names: tuple[str, ...], width: int, size: int):
    ref = dict(zip(names, refs, strict=True))
    n, (tokens, k), rows = pl.program_id(0), ref["slots"].shape, ref["rows"].shape[0]
    slots = [ref["slots"][n, j] for j in range(k)]
    weights = [ref["w"][n, j].astype(jnp.float32) if "w" in ref else None for j in range(k)]
    products = [0.0] * k
    for here, mask in _parts(width, size):
        x_d = load(ref["x"].at[n, here], mask).astype(jnp.float32)
        for j, (slot, weight) in enumerate(zip(slots, weights, strict=True)):
            at, used_d = jnp.minimum(slot, rows - 1), _where(mask, slot < rows, size)
            if "other" in ref:
                products[j] += jnp.sum(x_d * load(ref["other"].at[at, here], used_d).astype(jnp.float32))
            store(ref["rows"].at[at, here], x_d if weight is None else weight * x_d, used_d)
    if "products" in ref:
        for j, product in enumerate(products):
            store(ref["products"].at[n, np.int32(j)], product)
    per_program = pl.cdiv(rows, tokens)
    for i in range(per_program):
        r = n * per_program + i
        at = jnp.minimum(r, rows - 1)
        empty = (r < rows) & (ref["source"][at] >= tokens * k)
        for here, mask in _parts(width, size):
            store(ref["rows"].at[at, here], jnp.zeros(size), _where(mask, empty, size))


def _collect_kernel(*refs, names: tuple[str, ...], width: int, size: int):
    ref = dict(zip(names, refs, strict=True))
    n, k, rows = pl.program_id(0), ref["slots"].shape[1], ref["rows"].shape[0]
    slots = [ref["slots"][n, j] for j in range(k)]
    for here, mask in _parts(width, size):
        # All loads are issued before the first sum, so that they overlap.
        parts = [load(ref["rows"].at[jnp.minimum(s, rows - 1), here], _where(mask, s < rows, size)) for s in slots]
        y_d = jnp.zeros(size, jnp.float32)
        for j, part_d in enumerate(parts):
            part_d = part_d.astype(jnp.float32)
            y_d += ref["w"][n, j].astype(jnp.float32) * part_d if "w" in ref else part_d
        store(ref["y"].at[n, here], y_d, mask)
