"""The formats' definitions in numpy float64, element by element and block by block, with ml_dtypes for the formats.

Nothing here is shared with `orogen.precision`. Quotients are compared with the midpoints of
neighbours as exact fractions.
"""

from fractions import Fraction

import ml_dtypes
import numpy as np

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
# The first signs of the transform.
SIGNS = (-1, -1, -1, 1, -1, 1, -1, 1, 1, -1, 1, 1, 1, -1, 1, -1)
LARGEST = {"e4m3": 448, "e5m2": 57344, "e2m1": 6}


def numbers(kind):
    if kind == "e2m1":
        return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.arange(128, dtype=np.uint8).view(TYPES[kind]).astype(np.float64)
    return values[np.isfinite(values)]


def nearest(x, scale, kind):
    """The number of the format nearest to x / scale, exactly; ties to the even code; beyond the largest, the largest.
    x, scale: floats or Fractions, scale > 0."""
    values = numbers(kind)
    ratio = abs(Fraction(x)) / Fraction(scale)
    upper = int(np.searchsorted(values, float(ratio)))
    upper = min(max(upper, 1), len(values) - 1)
    for low in range(max(upper - 2, 0), min(upper + 1, len(values) - 1)):
        a, b = Fraction(values[low]), Fraction(values[low + 1])
        if a <= ratio <= b:
            middle = (a + b) / 2
            code = low if ratio < middle or (ratio == middle and low % 2 == 0) else low + 1
            return float(np.copysign(values[code], x))
    return float(np.copysign(values[-1], x))


def flushed(x):
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def divided(largest, by):
    """The float32 nearest to the quotient, at least 2^-117."""
    return np.float32(max(np.float64(largest) / by, 2.0**-117))


def tensor_scaled(x, kind, largest=None):
    """(values, scale) of a tensor with one float32 scale. largest: of the tensor, if x is a part of it."""
    x = flushed(x)
    largest = np.abs(x).max() if largest is None else largest
    if not np.isfinite(largest):
        return np.full(x.shape, np.nan), divided(0, LARGEST[kind])
    scale = divided(largest, LARGEST[kind])
    return np.vectorize(lambda v: nearest(float(v), float(scale), kind))(x).astype(np.float64), scale


def each_block(x, blocks):
    """Slices of all blocks."""
    ranges = [range(0, size, block) for size, block in zip(x.shape, blocks, strict=True)]
    for starts in np.ndindex(*(len(r) for r in ranges)):
        yield tuple(slice(r[i], r[i] + b) for r, i, b in zip(ranges, starts, blocks, strict=True))


def power_scaled(x, kind, blocks):
    """Values times their blocks' powers of two: the smallest by which the block fits."""
    x, found = flushed(x), np.zeros(np.shape(x))
    for at in each_block(x, blocks):
        largest = np.abs(x[at]).max()
        if not np.isfinite(largest):
            found[at] = np.nan
            continue
        power = -117
        while Fraction(float(largest)) > LARGEST[kind] * Fraction(2) ** power:
            power += 1
        scale = Fraction(2) ** power
        found[at] = np.vectorize(lambda v, s=scale: nearest(float(v), s, kind) * float(s))(x[at])
    return found


def two_level(x, blocks, four_over_six=False, largest=None):
    """(values times their blocks' E4M3 scales, the tensor's scale) of NVFP4. largest: as above."""
    x, found = flushed(x), np.zeros(np.shape(x))
    largest = np.abs(x).max() if largest is None else largest
    tensor = divided(largest if np.isfinite(largest) else 0, 6 * (256 if four_over_six else 448))
    if not np.isfinite(largest):
        return np.full(x.shape, np.nan), tensor
    for at in each_block(x, blocks):
        options = []
        for target in (6, 4) if four_over_six else (6,):
            scale = nearest(float(np.abs(x[at]).max()), target * Fraction(float(tensor)), "e4m3")
            by = Fraction(scale) * Fraction(float(tensor))
            quotient = (lambda v, by=by: nearest(float(v), by, "e2m1")) if scale else (lambda v: 0.0)
            values = np.vectorize(quotient, otypes=[float])(x[at]) * scale
            options.append((float(((values - x[at].astype(np.float64) / float(tensor)) ** 2).sum()), values))
        found[at] = min(options, key=lambda option: option[0])[1]
    return found, tensor


def hadamard(size, signs):
    """The matrix by which a column of `size` numbers is multiplied, float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix @ np.diag(signs) / np.sqrt(size)


def searched(x, blocks, largest=None):
    """`two_level` with the scale of least squared error for each block, the smallest of equal ones, by trying all. In
    float64, whose quotients cannot round onto a midpoint."""
    x, found = flushed(x).astype(np.float64), np.zeros(np.shape(x))
    tensor = divided(np.abs(x).max() if largest is None else largest, 6 * 448)
    values = numbers("e2m1")
    middles = (values[1:] + values[:-1]) / 2
    for at in each_block(x, blocks):
        best = np.inf
        for scale in numbers("e4m3")[1:]:
            ratio = np.abs(x[at]) / (scale * np.float64(tensor))
            low, high = np.searchsorted(middles, ratio, "left"), np.searchsorted(middles, ratio, "right")
            code = np.where((low != high) & (low % 2 == 1), high, low)
            rounded = np.copysign(values[code], x[at]) * scale
            error = float(((rounded - x[at] / np.float64(tensor)) ** 2).sum())
            if error < best:
                best, found[at] = error, rounded
    return found, tensor
