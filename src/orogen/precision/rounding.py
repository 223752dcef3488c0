"""Rounding to 8 and 4 bits with shared scales, to the bit as the formats define it, on any device.

A rounded number is `value · scale`: `value` is a number of the element format times its block's scale, which bfloat16
and TF32 hold exactly, so that products of values are exact; `scale` is one float32 for a whole tensor. Quotients are
never trusted: whether x lies above the midpoint of two neighbours is decided by an exact comparison, since a float32
quotient may round onto the midpoint, and GPUs divide approximately.

Defined results: numbers below float32's normal range count as zero; no scale is below 2^-117, so that all values are
normal; numbers beyond the largest one of a format become it; a number that is not finite makes its block NaN, and its
tensor if there is a scale per tensor.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.config.rounded import Operand
from orogen.parallel.varying import vary_like

FRACTION, BIAS = 0x007FFFFF, 127  # of a float32
SMALLEST_POWER = -117  # exponent of the smallest scale
# The largest block scale of nvfp4, and under four-over-six, which leaves room for scales 6/4 as large.
LARGEST_SCALE, LARGEST_SCALE_OF_TWO = 448, 256
# One bit per sign of the transform, the lowest bit first; 1 for -1. Drawn once, since numpy may change its generators.
SIGNS = 0xF00D6BAC63F1EA9B9F653652A9C9A257
E4M3_CODES = 0x7F  # of numbers from 0 on; the next one is NaN
BEYOND = 1 + 1e-5  # relative: a quotient by less above the largest number is rounding of the scale, not saturation


class Format(NamedTuple):
    """Bits of fraction, exponent of the smallest normal number, largest number."""

    fraction: int
    lowest: int
    largest: float


FORMATS = {"e4m3": Format(3, -6, 448.0), "e5m2": Format(2, -14, 57344.0), "e2m1": Format(1, 0, 6.0)}


class Encoded(NamedTuple):
    """value · scale; see above. scale: of the shape of the largest magnitudes given. For counters: unit, the product of
    a block's scales, 0 for zeros alone, with axes of blocks and neighbours; and which elements of x were `saturated`.
    """

    value: Array
    scale: Array
    unit: Array
    saturated: Array


def magnitude(x: Array) -> Array:
    """|x| in float32; 0 for what is below float32's normal range, as devices that flush such numbers compute it."""
    size = jnp.abs(x.astype(jnp.float32))
    return jnp.where(_bits(size) <= FRACTION, 0.0, size)


def encode(x: Array, operand: Operand, blocks: tuple[int, ...], largest: Array, words: Array | None = None) -> Encoded:
    """x (float32) rounded as `operand` says.

    blocks: per axis, how many neighbours share a block scale; the last block of an axis may be shorter. largest: the
    largest magnitude of each tensor, with axes of size 1 where all of x's axis is one tensor; NaN or infinite if one
    of its numbers is. Tensors change only between blocks. words: random uint32 of x's shape, for stochastic rounding.
    """
    form, shape = FORMATS[operand.element], x.shape
    a, x = _split(magnitude(x), blocks), _split(x, blocks)
    words = None if words is None else _split(words, blocks)
    inside = _inside(blocks)
    block = jnp.max(a, axis=inside, keepdims=True) if inside else a
    known, scale = _per_block(largest, blocks), jnp.ones_like(largest)
    if operand.scale == "power":
        tensor = _smallest_power(block, form.largest)
        found = _Found(jnp.ones_like(tensor), *_rounded(a, jnp.ones_like(tensor), tensor, form, words))
    elif operand.scale == "tensor":
        scale, block = _divided(largest, form.largest), known
        tensor = _per_block(scale, blocks)
        found = _Found(jnp.ones_like(tensor), *_rounded(a, jnp.ones_like(tensor), tensor, form, words))
    else:
        bound = LARGEST_SCALE_OF_TWO if operand.four_over_six else LARGEST_SCALE
        scale = _divided(largest, form.largest * bound)
        tensor = _per_block(scale, blocks)
        found = _two_level((a, block, tensor), form, operand, words, inside)
        block = jnp.where(jnp.isfinite(known), block, jnp.nan)
    factor = found.scale if operand.scale != "power" else tensor
    value = _signed(x, jnp.where(jnp.isfinite(block), found.value * factor, jnp.nan))
    unit = jnp.where(block == 0, 0.0, found.scale * tensor)
    return Encoded(_joined(value, shape, blocks), scale, unit, _joined(found.saturated, shape, blocks))


class _Found(NamedTuple):
    """Blocks' scales relative to their tensors', elements relative to both, and which of them were beyond the format.
    All are without signs."""

    scale: Array
    value: Array
    saturated: Array


def _smallest_power(block: Array, largest: float) -> Array:
    """The smallest power of two by which the block's largest number fits into a format."""
    bits, top = _bits(block), int(np.float32(largest).view(np.int32))
    exponent = (bits >> 23) - (top >> 23) + ((bits & FRACTION) > (top & FRACTION))
    return _power_of_two(jnp.clip(exponent, SMALLEST_POWER, BIAS))


def _two_level(
    sizes: tuple[Array, Array, Array], form: Format, operand: Operand, words: Array | None, inside: tuple[int, ...]
) -> _Found:
    """With blocks' scales in E4M3, for which the block's largest number becomes the format's. sizes: of elements, the
    largest of each block, and the tensors' scales."""
    a, block, tensor = sizes

    def by(target: float, words: Array | None) -> _Found:
        scale, _ = _rounded(block, jnp.full_like(block, target), tensor, FORMATS["e4m3"], None)
        return _Found(scale, *_rounded(a, scale, tensor, form, words))

    def error(found: _Found) -> Array:
        return jnp.sum((found.value * found.scale - a * _inverse(tensor)) ** 2, inside, keepdims=True)

    if operand.search:
        return _searched(sizes, form, inside)
    if not operand.four_over_six:
        return by(form.largest, words)
    # By the errors to the nearest, even if elements are drawn: choosing between two draws by their errors is biased.
    four, six = by(4.0, None), by(form.largest, None)
    better = error(four) < error(six)
    if words is None:
        return _Found(*(jnp.where(better, *pair) for pair in zip(four, six, strict=True)))
    scale = jnp.where(better, four.scale, six.scale)
    return _Found(scale, *_rounded(a, scale, tensor, form, words))


def _searched(sizes: tuple[Array, Array, Array], form: Format, inside: tuple[int, ...]) -> _Found:
    """With the scale of least squared error for each block among all positive numbers of E4M3, the smallest of equal
    ones. (A sweep of candidates as ModelOpt's for static block scales.) Elements are rounded to the nearest."""
    a, block, tensor = sizes
    ratio = a * _inverse(tensor)

    def by(code: Array) -> tuple[Array, Array, Array]:
        scale = jnp.broadcast_to(lax.bitcast_convert_type(code, jnp.float8_e4m3fn).astype(jnp.float32), block.shape)
        value, saturated = _rounded(a, scale, tensor, form, None)
        return scale, value, saturated

    def step(code: Array, best: tuple[Array, _Found]) -> tuple[Array, _Found]:
        error, found = best
        scale, value, saturated = by(code.astype(jnp.uint8))
        new = jnp.sum((value * scale - ratio) ** 2, inside, keepdims=True)
        new_found = _Found(scale, value, saturated)
        better = new < error
        return jnp.where(better, new, error), _Found(
            *(jnp.where(better, *two) for two in zip(new_found, found, strict=True))
        )

    start = _Found(*(vary_like(x, sizes) for x in by(jnp.uint8(1))))
    worst = vary_like(jnp.full(block.shape, jnp.inf), sizes)
    found = lax.fori_loop(1, E4M3_CODES, step, (worst, start))[1]
    return _Found(jnp.where(block == 0, 0.0, found.scale), found.value, found.saturated)


def _rounded(a: Array, block_scale: Array, scale: Array, form: Format, words: Array | None) -> tuple[Array, Array]:
    """a / (block_scale · scale) in the format, for a >= 0; 0 where block_scale is 0. And whether it is beyond it.

    To the nearest, ties to even; or, given random words, to either neighbour so that the mean is a's quotient (to
    2^-23 of it). block_scale has at most 4 significant bits.
    """
    product = block_scale * scale
    ratio = a * _inverse(product)
    top = int(np.float32(form.largest).view(np.int32)) >> 23
    exponent = jnp.clip((_bits(ratio) >> 23) - BIAS, form.lowest, top - BIAS) - form.fraction
    unit = _power_of_two(exponent)
    units = ratio * _power_of_two(-exponent)
    if words is not None:
        whole = jnp.floor(units + (words >> np.uint32(8)).astype(jnp.float32) * 2.0**-24)
    else:
        whole = jnp.floor(units)
        # midpoint · scale as a sum of two exact products: the midpoint has 9 bits, each half of the scale 12.
        midpoint = (whole + 0.5) * unit * block_scale
        high = lax.bitcast_convert_type(_bits(scale) & ~0xFFF, jnp.float32)
        above = (a - midpoint * high) - midpoint * (scale - high)
        odd = whole - 2 * jnp.floor(whole * 0.5)
        whole = whole + jnp.where(above == 0, odd, (above > 0).astype(jnp.float32))
    value = jnp.where(block_scale == 0, 0.0, jnp.minimum(whole * unit, form.largest))
    return value, ratio > form.largest * BEYOND


def _divided(largest: Array, by: float) -> Array:
    """The float32 nearest to largest / by, for whole numbers `by` with at most 12 significant bits.

    At least the smallest scale, which tensors of zeros have, too.
    """
    near = jnp.maximum(jnp.where(jnp.isfinite(largest), largest, 0.0) / by, 2.0**SMALLEST_POWER)

    def error(candidate: Array) -> Array:
        high = lax.bitcast_convert_type(_bits(candidate) & ~0xFFF, jnp.float32)
        return jnp.abs((largest - high * by) - (candidate - high) * by)

    best = near
    for step in (-1, 1):
        other = lax.bitcast_convert_type(_bits(near) + step, jnp.float32)
        best = jnp.where(error(other) < error(best), other, best)
    return jnp.maximum(best, 2.0**SMALLEST_POWER)


def transformed(x: Array, size: int, axis: int) -> Array:
    """The randomised Hadamard transform of each `size` neighbours of x (float32) along an axis, which `size` divides:
    H diag(signs) / √size. The two operands of a product along that axis keep their product.

    Sums are float32, in the order of the fast transform: pairs at distance 1, then 2, then 4. The signs are fixed, the
    same for all tensors (arXiv:2509.25149, section 4.2).
    """
    shape = x.shape
    apart = x.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
    parts = [sign * lax.index_in_dim(apart, i, axis + 1, keepdims=False) for i, sign in enumerate(signs(size))]
    distance = 1
    while distance < size:
        for start in range(0, size, 2 * distance):
            for i in range(start, start + distance):
                parts[i], parts[i + distance] = parts[i] + parts[i + distance], parts[i] - parts[i + distance]
        distance *= 2
    return (jnp.stack(parts, axis + 1) * np.float32(1 / math.sqrt(size))).reshape(shape)


def signs(size: int) -> list[float]:
    """The fixed random signs of the transform, at most 128."""
    return [1.0 - 2.0 * (SIGNS >> i & 1) for i in range(size)]


def _split(x: Array, blocks: tuple[int, ...]) -> Array:
    """x, filled up with zeros, with two axes, of blocks and of neighbours, for each axis that blocks split."""
    # Other axes stay as they are: with an axis of one neighbour beside them, programs of XLA:CPU crashed (observed with
    # jax 0.10.1; cause unknown).
    lacking = [(0, -size % b) for size, b in zip(x.shape, blocks, strict=True)]
    x = jnp.pad(x, lacking) if any(after for _, after in lacking) else x
    pairs = [(size // b, b) if b > 1 else (size,) for size, b in zip(x.shape, blocks, strict=True)]
    return x.reshape([size for pair in pairs for size in pair])


def _joined(x: Array, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Array:
    """The inverse of `_split`, for an x that had this shape."""
    whole = x.reshape([-(-size // b) * b for size, b in zip(shape, blocks, strict=True)])
    return lax.slice(whole, [0] * len(shape), shape)


def _inside(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of neighbours that `_split` makes."""
    found, axis = [], 0
    for block in blocks:
        axis += 1
        if block > 1:
            found.append(axis)
            axis += 1
    return tuple(found)


def _per_block(scale: Array, blocks: tuple[int, ...]) -> Array:
    """Each block's tensor scale, with axes as `_split` makes them."""
    for axis, block in reversed(list(enumerate(blocks))):
        if block > 1:
            if scale.shape[axis] > 1:
                scale = lax.slice_in_dim(scale, 0, scale.shape[axis], block, axis)
            scale = jnp.expand_dims(scale, axis + 1)
    return scale


def _signed(x: Array, size: Array) -> Array:
    return jnp.where(x < 0, -size, size)


def _inverse(scale: Array) -> Array:
    return jnp.where(scale > 0, 1 / scale, 0.0)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _power_of_two(exponent: Array) -> Array:
    return lax.bitcast_convert_type((exponent + BIAS) << 23, jnp.float32)
