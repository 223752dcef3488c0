"""Products of activations with weights whose operands are rounded first, as a recipe says (`config/rounded.py`).

The values of rounded operands are exact in the compute dtype, so their products are exact too; sums are float32, and
scales of tensors are multiplied last (except in the gradients of experts' weights, see `expert_rows.py`). A tensor of
activations or gradients is one sequence, on however many ranks of context and tensor it lies.

Letters: b batch, t time, d width in, f width out of one of several weights.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.config.rounded import Operand, Products
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like
from orogen.precision.counts import COUNTS, count, held_along
from orogen.precision.rounding import Encoded, encode, magnitude, transformed
from orogen.precision.words import columns, operand_key, words

# Numbers of the operands that random words tell apart, added to a product's own; 64 for each product.
WEIGHT, ACTIVATION, GRADIENT, OVER_TOKENS = 0, 16, 32, 8


class Offsets(NamedTuple):
    """Where a product's operands lie in the whole tensors; what random words are made of. key: of the step; layer: its
    number; number_bt: of each token; row: the first of this rank's rows of the weights; column_i: of each weight, the
    first of this rank's columns."""

    key: Array
    layer: Array
    number_bt: Array
    row: Array
    column_i: tuple[Array, ...]


class How(NamedTuple):
    """What does not depend on numbers. name: the product's own number, for random words; plan: without arrays."""

    products: Products
    plan: Plan
    name: int
    counted: bool

    @property
    def unit(self) -> int:
        """How many neighbouring columns of the weights are rounded together."""
        return self.products.block


def rounded_products(
    x_btd: Array, weights_df: Sequence[Array], how: How, offsets: Offsets, probe: Array | None
) -> tuple[Array, ...]:
    """x w (b, t, f) in x's dtype for each weight (d, f). The weights share a tensor scale, as do the gradients of their
    outputs. probe: (operands, counters) zeros whose gradient is the counters, if `how.counted`."""
    probe = jnp.zeros(()) if probe is None else probe
    operands = (x_btd, tuple(weights_df), probe, offsets)
    return _products(how, *vary_like(operands, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(how: How, x_btd: Array, weights_df: tuple[Array, ...], probe: Array, offsets: Offsets) -> Any:
    return _forward(how, x_btd, weights_df, probe, offsets)[0]


def _forward(how, x_btd, weights_df, probe, offsets):
    pair, counted = how.products.forward, jnp.zeros((2, len(COUNTS)))
    if pair is None:
        y_btf = tuple((_flat(x_btd) @ w_df).reshape(*x_btd.shape[:2], -1) for w_df in weights_df)
    else:
        x, x_counts = _activations(how, Joined.of((x_btd,), 1), pair[0], 2, offsets, name=ACTIVATION)
        joint = Joined.of(weights_df, how.unit)
        w, w_counts = _weights(how, joint, pair[1], 0, offsets)
        y_btf = joint.split(_times(_contract(x.value, w.value, 0), (x, w), x_btd))
        counted = jnp.stack([x_counts, w_counts])
    return y_btf, (x_btd, weights_df, offsets, counted)


def _backward(how, kept, grads_btf):
    x_btd, weights_df, offsets, counted = kept
    dx_btd, dx_counts = _input_gradient(how, x_btd, weights_df, grads_btf, offsets)
    dweights_df, dw_counts = _weight_gradient(how, x_btd, weights_df, grads_btf, offsets)
    stats = jnp.concatenate([counted, dx_counts, dw_counts]) if how.counted else jnp.zeros(())
    return dx_btd, dweights_df, vary_like(stats, (x_btd, weights_df)), None


_products.defvjp(_forward, _backward)


def _input_gradient(how, x_btd, weights_df, grads_btf, offsets):
    pair = how.products.input_gradient
    if pair is None:
        dx_nd = jnp.concatenate([_flat(g_btf) for g_btf in grads_btf], 1) @ jnp.concatenate(weights_df, 1).T
        return dx_nd.reshape(x_btd.shape).astype(x_btd.dtype), jnp.zeros((2, len(COUNTS)))
    grad, g_counts = _activations(how, Joined.of(grads_btf, how.unit), pair[0], 2, offsets, name=GRADIENT)
    w, w_counts = _weights(how, Joined.of(weights_df, how.unit), pair[1], 1, offsets)
    return _times(_contract(grad.value, w.value, 1), (grad, w), x_btd), jnp.stack([g_counts, w_counts])


def _weight_gradient(how, x_btd, weights_df, grads_btf, offsets):
    pair = how.products.weight_gradient
    if pair is None:
        found = (_flat(x_btd).T @ _flat(g_btf) for g_btf in grads_btf)
        return tuple(dw.astype(w.dtype) for dw, w in zip(found, weights_df, strict=True)), jnp.zeros((2, len(COUNTS)))
    joint = Joined.of(grads_btf, how.unit)
    x, x_counts = _activations(how, Joined.of((x_btd,), 1), pair[0], 1, offsets, name=ACTIVATION + OVER_TOKENS)
    grad, g_counts = _activations(how, joint, pair[1], 1, offsets, name=GRADIENT + OVER_TOKENS)
    parts = joint.split(_sum_over_tokens(x, grad))
    found = tuple(dw.astype(w.dtype) for dw, w in zip(parts, weights_df, strict=True))
    return found, jnp.stack([x_counts, g_counts])


def _sum_over_tokens(x: Encoded, grad: Encoded) -> Array:
    """xᵀ dy (d, f) in float32, where each sequence has scales of its own."""
    if len(x.scale) == len(grad.scale) == 1:
        dims = (((0,), (0,)), ((), ()))
        whole_df = jax.lax.dot_general(_flat(x.value), _flat(grad.value), dims, preferred_element_type=jnp.float32)
        return whole_df * x.scale[0] * grad.scale[0]
    dims = (((1,), (1,)), ((0,), (0,)))
    each_bdf = jax.lax.dot_general(x.value, grad.value, dims, preferred_element_type=jnp.float32)
    return jnp.sum(each_bdf * x.scale * grad.scale, axis=0)


class Joined(NamedTuple):
    """Matrices side by side, each filled up with zeros to whole blocks of columns, so that no block is of two."""

    array: Array
    widths: tuple[int, ...]
    filled: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Array], unit: int) -> "Joined":
        """`parts`, whose columns are filled up to multiples of `unit`."""
        widths = tuple(part.shape[-1] for part in parts)
        filled = tuple(-(-width // unit) * unit for width in widths)
        more = [f - w for f, w in zip(filled, widths, strict=True)]
        wide = [jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, n)]) if n else p for p, n in zip(parts, more, strict=True)]
        return cls(wide[0] if len(wide) == 1 else jnp.concatenate(wide, axis=-1), widths, filled)

    @property
    def held(self) -> Array:
        """The mask of the columns that are of the parts."""
        apart = [np.arange(f) < w for w, f in zip(self.widths, self.filled, strict=True)]
        return jnp.asarray(np.concatenate(apart))

    def split(self, array: Array) -> tuple[Array, ...]:
        """The parts of an array with these columns, without what fills them up."""
        starts = np.cumsum([0, *self.filled[:-1]]).tolist()
        return tuple(array[..., start : start + width] for start, width in zip(starts, self.widths, strict=True))

    def columns(self, first_i: Sequence[Array]) -> Array:
        """The places of the columns, of which each part's first ones are given; no two parts share a place."""
        apart = [
            columns(first + np.uint32(i << 26), n)
            for i, (first, n) in enumerate(zip(first_i, self.filled, strict=True))
        ]
        return jnp.concatenate(apart)


def _activations(
    how: How, joint: Joined, operand: Operand, axis: int, offsets: Offsets, *, name: int
) -> tuple[Encoded, Array]:
    """Activations or gradients (b, t, f), rounded along `axis`, and their counters."""
    x = prepared(joint.array, operand, axis)
    largest = _largest(how.plan, x, (1, 2), operand, ("context", "tensor"))
    random = None
    if operand.stochastic:
        key = operand_key(offsets.key, offsets.layer, how.name * 64 + name)
        first_i = (offsets.row,) if name < GRADIENT else offsets.column_i
        place_f = _filled(joint.columns(first_i), x.shape[2])
        random = words(key, _filled(offsets.number_bt, x.shape[1]), place_f)
    blocks = tuple(operand.block or 1 if i == axis else 1 for i in range(3))
    return _kept(how, joint, x, encode(x, operand, blocks, largest, random), (operand, axis))


def _weights(how: How, joint: Joined, operand: Operand, axis: int, offsets: Offsets) -> tuple[Encoded, Array]:
    """Weights (d, f), rounded along `axis`, and their counters."""
    w = prepared(joint.array, operand, axis)
    largest = _largest(how.plan, w, (0, 1), operand, ("tensor",))
    random = None
    if operand.stochastic:
        key = operand_key(offsets.key, offsets.layer, how.name * 64 + WEIGHT)
        place_f = _filled(joint.columns(offsets.column_i), w.shape[1])
        random = words(key, columns(offsets.row, w.shape[0]), place_f)
    blocks = tuple(operand.block or 1 if operand.square or i == axis else 1 for i in range(2))
    return _kept(how, joint, w, encode(w, operand, blocks, largest, random), (operand, axis))


def _kept(how: How, joint: Joined, x: Array, found: Encoded, along: tuple[Operand, int]) -> tuple[Encoded, Array]:
    """An operand as it is multiplied, and its counters, in which zeros that fill up blocks do not count. along: how it
    was rounded, and along which axis."""
    counted = jnp.zeros(len(COUNTS))
    if how.counted:
        (operand, axis), last = along, x.ndim - 1
        held = {last: joint.held}
        mask = held.get(axis, jnp.ones(joint.array.shape[axis], bool))
        held[axis] = held_along(mask, x.shape[axis], operand.hadamard)
        counted = count(x, found, [along_axis(mask, i, x.ndim) for i, mask in held.items()])
    return found._replace(value=found.value.astype(joint.array.dtype)), counted


def along_axis(mask: Array, axis: int, ndim: int) -> Array:
    """The mask with size 1 along the other axes of an array of `ndim`."""
    return mask.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _filled(offsets: Array, length: int) -> Array:
    """Offsets for what fills up the last block of the last axis too: a transform spreads numbers over it."""
    if offsets.shape[-1] == length:
        return offsets
    more = jnp.arange(length - offsets.shape[-1], dtype=offsets.dtype) + np.asarray(1 << 30, offsets.dtype)
    return jnp.concatenate(
        [offsets, jnp.broadcast_to(more, (*offsets.shape[:-1], len(more))) + offsets[..., :1]], axis=-1
    )


def prepared(x: Array, operand: Operand, axis: int) -> Array:
    """x in float32, transformed along `axis` if the operand is; the axis is then filled up with zeros first."""
    x = x.astype(jnp.float32)
    if not operand.hadamard:
        return x
    lacking = [(0, -x.shape[i] % operand.together if i == axis else 0) for i in range(x.ndim)]
    return transformed(jnp.pad(x, lacking), operand.hadamard, axis)


def _largest(plan: Plan, x: Array, within: tuple[int, ...], operand: Operand, split: tuple[str, ...]) -> Array:
    """The largest magnitude along the axes `within`, which are split over `split`; infinite if a number is not finite.
    Ones where no scale depends on it."""
    if operand.scale == "power":
        return jnp.ones([1] * x.ndim)
    largest = finite_or_infinite(jnp.max(magnitude(x), axis=within, keepdims=True))
    for axis in split:
        largest = plan.max(largest, axis)
    return largest


def finite_or_infinite(largest: Array) -> Array:
    """`largest` with infinity for NaN, which not every maximum over ranks would pass on."""
    return jnp.where(jnp.isfinite(largest), largest, jnp.inf)


def _contract(left_btk: Array, right: Array, axis: int) -> Array:
    """left (b · t, k) times a matrix over its axis `axis`, in float32."""
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(_flat(left_btk), right, dims, preferred_element_type=jnp.float32)


def _times(y_nf: Array, operands: tuple[Encoded, Encoded], like_btd: Array) -> Array:
    """A product times its operands' scales, as (b, t, f) in the dtype of `like_btd`."""
    left, right = operands
    y_btf = y_nf.reshape(*like_btd.shape[:2], -1)
    return (y_btf * left.scale * right.scale[None]).astype(like_btd.dtype)


def _flat(x_btd: Array) -> Array:
    return x_btd.reshape(-1, x_btd.shape[-1])
