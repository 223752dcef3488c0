"""Products of experts' rows with their weights, with operands that are rounded first (`precision/emulated.py`).

A tensor is the rows of one expert from `expert_tokens` neighbouring tokens of a sequence, in the order of the tokens.
So neither the order in which rows arrive nor the number of ranks changes how they are rounded. For the weights'
gradient, whose blocks are of rows, each tensor's rows are filled up to whole blocks with zeros. That gradient sums over
tensors, each with a scale of its own, which is multiplied in before the product: this one product is in float32
throughout, on a GPU too.

Letters: r rows sorted by expert, d width in, f width out, e experts of this rank, p filled up rows, s tensors.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.config.plan import FOR_GPU
from orogen.config.rounded import Operand
from orogen.kernels.grouped_matmul import grouped_matmul
from orogen.parallel.varying import vary_like
from orogen.precision.counts import COUNTS, count, held_along
from orogen.precision.emulated import (
    ACTIVATION,
    GRADIENT,
    OVER_TOKENS,
    WEIGHT,
    How,
    along_axis,
    finite_or_infinite,
    prepared,
)
from orogen.precision.rounding import Encoded, encode, magnitude
from orogen.precision.words import columns, operand_key, words


class RowOrder(NamedTuple):
    """Where the rows of a rank's experts belong. number_r: the token's number in the global batch, -1 for a row of no
    token; expert_r: the rank's expert, e for none; tensor_r: the tensor, r for none; place_r: the row's place in order,
    tensors filled up, p for none; filled_e: rows per expert, filled up."""

    number_r: Array
    expert_r: Array
    tensor_r: Array
    place_r: Array
    filled_e: Array


class RowOffsets(NamedTuple):
    """`emulated.Offsets` of experts' operands. expert: the first of this rank's experts; row, column: of this rank's
    part of the weights."""

    key: Array
    layer: Array
    expert: Array
    row: Array
    column: Array


def expert_rows(
    number_r: Array, group_sizes: Array | int, *, experts: int, tokens: int, chunk: int, unit: int
) -> tuple[RowOrder, int]:
    """The rows' places, and the number of filled up rows. tokens: of the global batch; chunk: tokens per tensor; unit:
    how many rows are rounded together."""
    rows = len(number_r)
    index_r = jnp.arange(rows, dtype=jnp.int32)
    if isinstance(group_sizes, int):
        expert_r = index_r // group_sizes
    else:
        expert_r = jnp.searchsorted(jnp.cumsum(group_sizes), index_r, side="right").astype(jnp.int32)
    expert_r = jnp.where((number_r < 0) | (expert_r >= experts), experts, expert_r)
    at = lax.sort((expert_r, number_r, index_r), num_keys=2)
    first = jnp.concatenate([jnp.ones(1, bool), _differs(at[0]) | _differs(at[1] // chunk)])
    held = at[0] < experts
    tensor = jnp.where(held, jnp.cumsum(first) - 1, rows)
    start = lax.cummax(jnp.where(first, index_r, 0))
    size_s = vary_like(jnp.zeros(rows + 1, jnp.int32), expert_r).at[tensor].add(1)
    filled_s = -(-size_s // unit) * unit
    before_s = jnp.cumsum(filled_s) - filled_s
    total = rows + min(rows, experts * -(-tokens // chunk)) * (unit - 1)
    total = -(-total // unit) * unit
    place = jnp.where(held, before_s[tensor] + index_r - start, total)
    back = lambda a: jnp.zeros_like(index_r).at[at[2]].set(a.astype(jnp.int32), unique_indices=True)  # noqa: E731
    filled_e = vary_like(jnp.zeros(experts + 1, jnp.int32), expert_r)
    filled_e = filled_e.at[at[0]].add(jnp.where(first & held, filled_s[tensor], 0))[:experts]
    return RowOrder(number_r, expert_r, back(tensor), back(place), filled_e), total


def _differs(a: Array) -> Array:
    return a[1:] != a[:-1]


class GroupedHow(NamedTuple):
    """`emulated.How`, with the number of filled up rows and the implementation of the product."""

    how: How
    filled: int
    implementation: str


def rounded_grouped(
    x_rd: Array,
    weights_edf: Array,
    group_sizes: Array | int,
    *,
    rows: RowOrder,
    how: GroupedHow,
    offsets: RowOffsets,
    probe: Array | None,
) -> Array:
    """x w_e (r, f) in x's dtype for the rows of each expert; zero for rows of none. Every expert has a tensor scale of
    its own."""
    if isinstance(group_sizes, int):
        group_sizes = jnp.full(len(weights_edf), group_sizes, jnp.int32)
    probe = jnp.zeros(()) if probe is None else probe
    operands = (x_rd, weights_edf, probe, (group_sizes, rows, offsets))
    return _products(how, *vary_like(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(how: GroupedHow, x_rd: Array, weights_edf: Array, probe: Array, at: Any) -> Array:
    return _forward(how, x_rd, weights_edf, probe, at)[0]


def _forward(how, x_rd, weights_edf, probe, at):
    sizes, rows, offsets = at
    pair, counted = how.how.products.forward, jnp.zeros((2, len(COUNTS)))
    multiply = functools.partial(grouped_matmul, implementation=how.implementation)
    if pair is None:
        y_rf = multiply(x_rd, weights_edf, sizes)
    else:
        x, x_counts = _features(how, x_rd, pair[0], at, name=ACTIVATION)
        w, w_counts = _weights(how, weights_edf, pair[1], 1, offsets)
        y_rf = _scaled(multiply(x.value, w.value, sizes), x, w, rows).astype(x_rd.dtype)
        counted = jnp.stack([x_counts, w_counts])
    return y_rf, (x_rd, weights_edf, at, counted)


def _backward(how, kept, grad_rf):
    x_rd, weights_edf, at, counted = kept
    dx_rd, dx_counts = _input_gradient(how, weights_edf, grad_rf, at)
    dw_edf, dw_counts = _weight_gradient(how, x_rd, grad_rf, weights_edf, at)
    stats = jnp.concatenate([counted, dx_counts, dw_counts]) if how.how.counted else jnp.zeros(())
    operands = (x_rd, weights_edf)
    return dx_rd.astype(x_rd.dtype), dw_edf.astype(weights_edf.dtype), vary_like(stats, operands), None


_products.defvjp(_forward, _backward)


def _input_gradient(how, weights_edf, grad_rf, at):
    sizes, rows, offsets = at
    pair = how.how.products.input_gradient
    multiply = functools.partial(grouped_matmul, implementation=how.implementation)
    if pair is None:
        return multiply(grad_rf, weights_edf.swapaxes(1, 2), sizes), jnp.zeros((2, len(COUNTS)))
    grad, g_counts = _features(how, grad_rf, pair[0], at, name=GRADIENT)
    w, w_counts = _weights(how, weights_edf, pair[1], 2, offsets)
    return _scaled(multiply(grad.value, w.value.swapaxes(1, 2), sizes), grad, w, rows), jnp.stack([g_counts, w_counts])


def _weight_gradient(how, x_rd, grad_rf, weights_edf, at):
    sizes, rows, offsets = at
    pair = how.how.products.weight_gradient
    if pair is None:
        return _outer(how, x_rd, grad_rf, weights_edf, sizes), jnp.zeros((2, len(COUNTS)))
    x, x_counts = _over_rows(how, x_rd, pair[0], at, name=ACTIVATION + OVER_TOKENS)
    grad, g_counts = _over_rows(how, grad_rf, pair[1], at, name=GRADIENT + OVER_TOKENS)
    # Each tensor has scales of its own, and an expert's gradient sums over tensors. Only float32 holds values times
    # their scales, not bfloat16 or TF32.
    x_pd, scaled_pf = x.value.astype(jnp.float32), grad.value.astype(jnp.float32) * (x.scale * grad.scale)
    if how.implementation == FOR_GPU["grouped_matmul"]:
        how = how._replace(implementation="blocks")  # since that kernel lacks float32
    with jax.default_matmul_precision("highest"):
        dw_edf = _outer(how, x_pd, scaled_pf, weights_edf, rows.filled_e)
    return dw_edf, jnp.stack([x_counts, g_counts])


def _outer(how: GroupedHow, x_rd: Array, grad_rf: Array, weights_edf: Array, sizes: Array) -> Array:
    """The weights' gradient (e, d, f) of a grouped product."""
    multiply = lambda w: grouped_matmul(x_rd, w, sizes, implementation=how.implementation)  # noqa: E731
    zeros = vary_like(jnp.zeros(weights_edf.shape, x_rd.dtype), (x_rd, grad_rf, weights_edf))
    return jax.vjp(multiply, zeros)[1](grad_rf.astype(x_rd.dtype))[0]


def _scaled(y_rf: Array, left: Encoded, weights: Encoded, rows: RowOrder) -> Array:
    """Rows times their own scale and that of their expert's weights."""
    scale_e = weights.scale[:, 0]
    expert_r = jnp.minimum(rows.expert_r, len(scale_e) - 1) if len(scale_e) > 1 else 0 * rows.expert_r
    return y_rf.astype(jnp.float32) * left.scale * scale_e[expert_r]


def _features(how: GroupedHow, x_rd: Array, operand: Operand, at: Any, *, name: int) -> tuple[Encoded, Array]:
    """Rows rounded along their features, and the operand's counters."""
    _, rows, offsets = at
    moved = prepared(x_rd, operand, 1)
    random = _row_words(how, operand, offsets, (rows.number_r, rows.expert_r), name=name, width=moved.shape[1])
    largest = _largest_of_tensor(how, moved, operand, rows.tensor_r)
    found = encode(moved, operand, (1, operand.block or 1), largest, random)
    # Rows of no token do not count, nor do their blocks: other ranks, or none, multiply them.
    held_r = rows.tensor_r < len(x_rd)
    found = found._replace(unit=jnp.where(along_axis(held_r, 0, found.unit.ndim), found.unit, 0))
    held_d = held_along(jnp.ones(x_rd.shape[1], bool), moved.shape[1], operand.hadamard)
    return _kept(how, moved, found, x_rd.dtype, (held_r[:, None], held_d[None]))


def _over_rows(how: GroupedHow, x_rd: Array, operand: Operand, at: Any, *, name: int) -> tuple[Encoded, Array]:
    """Rows in order, filled up (p, d), rounded along the rows, and the operand's counters."""
    _, rows, offsets = at
    source_p = vary_like(jnp.full(how.filled, len(x_rd), jnp.int32), rows.place_r)
    source_p = source_p.at[rows.place_r].set(jnp.arange(len(x_rd), dtype=jnp.int32), mode="drop")
    placed = lambda a, fill: jnp.take(a, source_p, axis=0, mode="fill", fill_value=fill)  # noqa: E731
    moved = prepared(placed(x_rd, 0), operand, 0)
    unit = operand.together
    # A tensor's filling has its scale: the first row of what is rounded together is never filling.
    first_p = jnp.arange(how.filled, dtype=jnp.int32) // unit * unit
    tensor_p = placed(rows.tensor_r, len(x_rd))[first_p]
    # The filling, too, has random words of its own, since a transform spreads numbers over it.
    number_p, expert_p = placed(rows.number_r, -1)[first_p], placed(rows.expert_r, 0)[first_p]
    number_p += (jnp.arange(how.filled, dtype=jnp.int32) - first_p) * np.int32(1 << 24)
    random = _row_words(how, operand, offsets, (number_p, expert_p), name=name, width=moved.shape[1])
    largest = _largest_of_tensor(how, moved, operand, tensor_p)
    found = encode(moved, operand, (operand.block or 1, 1), largest, random)
    held_p = held_along(source_p < len(x_rd), how.filled, operand.hadamard)
    return _kept(how, moved, found, x_rd.dtype, (held_p[:, None],))


def _kept(how: GroupedHow, moved: Array, found: Encoded, dtype: Any, held: Sequence[Array]) -> tuple[Encoded, Array]:
    """The operand as it is multiplied, and its counters; held: see `count`."""
    counted = count(moved, found, held) if how.how.counted else jnp.zeros(len(COUNTS))
    return found._replace(value=found.value.astype(_dtype(how, dtype))), counted


def _weights(
    how: GroupedHow, weights_edf: Array, operand: Operand, axis: int, offsets: RowOffsets
) -> tuple[Encoded, Array]:
    """Weights rounded along `axis`, and the operand's counters."""
    moved = prepared(weights_edf, operand, axis)
    blocks = tuple(operand.block or 1 if (operand.square and i) or i == axis else 1 for i in range(3))
    random = None
    if operand.stochastic:
        key = operand_key(offsets.key, offsets.layer, how.how.name * 64 + WEIGHT)
        row = columns(offsets.row, moved.shape[1])
        row_ed = columns(offsets.expert, moved.shape[0])[:, None] * np.uint32(0x9E3779B9) + row
        random = words(key, row_ed, columns(offsets.column, moved.shape[2]))
    largest = jnp.ones((1, 1, 1))
    if operand.scale != "power":
        largest = finite_or_infinite(jnp.max(magnitude(moved), (1, 2), keepdims=True))
        largest = how.how.plan.max(largest, "expert_tensor")
    held = held_along(jnp.ones(weights_edf.shape[axis], bool), moved.shape[axis], operand.hadamard)
    found = encode(moved, operand, blocks, largest, random)
    return _kept(how, moved, found, weights_edf.dtype, (along_axis(held, axis, 3),))


def _row_words(
    how: GroupedHow, operand: Operand, offsets: RowOffsets, tokens: tuple[Array, Array], *, name: int, width: int
) -> Array | None:
    """Random words for rows of `width` numbers, if the operand needs any. tokens: their numbers and their experts."""
    if not operand.stochastic:
        return None
    number_r, expert_r = tokens
    key = operand_key(offsets.key, offsets.layer, how.how.name * 64 + name)
    # A token has a row at each of its experts.
    expert_r = offsets.expert.astype(jnp.uint32) + expert_r.astype(jnp.uint32)
    row_r = number_r.astype(jnp.uint32) + expert_r * np.uint32(0x9E3779B9)
    first = offsets.column if name >= GRADIENT else offsets.row
    return words(key, row_r, columns(first, width))


def _largest_of_tensor(how: GroupedHow, x_rd: Array, operand: Operand, tensor_r: Array) -> Array:
    """(r, 1): the largest magnitude of each row's tensor; infinite if a number is not finite. (1, 1) of ones where no
    scale depends on it."""
    if operand.scale == "power":
        return jnp.ones((1, 1))
    each_r = finite_or_infinite(jnp.max(magnitude(x_rd), axis=1))
    count = len(tensor_r) + 1
    largest_s = vary_like(jnp.zeros(count), each_r).at[jnp.minimum(tensor_r, count - 1)].max(each_r)
    largest_s = how.how.plan.max(largest_s, "expert_tensor")
    return largest_s[jnp.minimum(tensor_r, count - 1)][:, None]


def _dtype(how: GroupedHow, dtype: Any) -> Any:
    """Values are multiplied in float32, except by a kernel that lacks it."""
    return dtype if how.implementation == FOR_GPU["grouped_matmul"] else jnp.float32
