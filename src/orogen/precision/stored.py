"""Weights as files of quantised models store them: packed numbers, the scales that they share, and their decoding.

A matrix is (out, in), as PyTorch stores a linear map; leading axes, such as experts, have scales of their own. Formats:

- `fp8_tensor`: E4M3, one float32 scale per matrix.
- `fp8_channel`: E4M3, one scale per output channel, a row.
- `fp8_block`: E4M3, one scale per block of `block` (rows, columns), 128 x 128 by default.
- `nvfp4`: E2M1, two numbers a byte, the first one in the low four bits; an E4M3 scale per 16 columns of a row, and one
  float32 global scale per matrix. ModelOpt stores the global scale by which numbers are multiplied (`weight_scale_2`),
  compressed-tensors its reciprocal, by which they are divided (`weight_global_scale`): `inverse`.

The last blocks of an axis may be shorter; an odd last column leaves four bits that are zero.

**A decoded number is the float32 nearest to the exact product** of number and scales. **An encoded number is the
format's nearest to the exact quotient**, ties to even, of x by the scales as they are stored. Quotients are taken in
float64: they cannot fall onto a midpoint, which has at most 31 bits of the product that x, of at most 48 bits, equals.

Defined results, as in `rounding.py`: numbers below float32's normal range count as zero; no float32 scale is below
2^-117; numbers beyond the largest of a format become it, and so do block scales beyond 448; a block whose scale rounds
to zero is zero. A number that is not finite makes its scale NaN and with it all numbers that share it; under given
scales it is itself NaN in FP8, and makes its block's scale NaN in NVFP4. `Lost` counts all of this.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from orogen.precision.rounding import BEYOND, FORMATS, LARGEST_SCALE, SMALLEST_POWER, Format

E4M3 = np.dtype(jnp.float8_e4m3fn)
FP8 = ("fp8_tensor", "fp8_channel", "fp8_block")
STORED = (*FP8, "nvfp4")
FP8_BLOCK, NVFP4_BLOCK = (128, 128), (1, 16)
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1 by its bits
E4M3_NAN = 0x7F
FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Quantised matrices (…, out, in); see above.

    values: E4M3 (…, out, in), or uint8 (…, out, ⌈in / 2⌉) of nvfp4. scale: (…) of fp8_tensor, (…, out) of fp8_channel,
    (…, ⌈out / rows⌉, ⌈in / columns⌉) of fp8_block and of nvfp4, where it is E4M3. global_scale: float32 (…) of nvfp4.
    shape, dtype: of the matrices before they were quantised.
    """

    format: str
    values: np.ndarray
    scale: np.ndarray
    global_scale: np.ndarray | None = None
    inverse: bool = False
    block: tuple[int, int] = (1, 1)
    shape: tuple[int, ...]
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.format not in STORED:
            raise ValueError(f"format is {self.format!r}; expected one of {', '.join(STORED)}")
        wanted = stored_shapes(self.format, self.shape, self.block)
        found: dict[str, Any] = {"values": self.values.shape, "scale": self.scale.shape}
        if self.global_scale is not None:
            found["global_scale"] = self.global_scale.shape
        if found != wanted:
            raise ValueError(f"{self.format} of {self.shape} has {found}; expected {wanted}")

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.values.nbytes + self.scale.nbytes + (0 if self.global_scale is None else self.global_scale.nbytes)


class Lost(NamedTuple):
    """What an encoding lost: numbers; those that were 0; those that became 0; those beyond the format's largest; those
    not finite; scales; those that became 0 though their block is not; those beyond the largest."""

    numbers: int
    zeros: int
    flushed: int
    saturated: int
    nonfinite: int
    scales: int
    scales_flushed: int
    scales_saturated: int


def block_of(kind: str) -> tuple[int, int]:
    """The rows and columns that share a scale in a format whose blocks are fixed or by default; (1, 1) for others."""
    return {"fp8_block": FP8_BLOCK, "nvfp4": NVFP4_BLOCK}.get(kind, (1, 1))


def stored_shapes(kind: str, shape: tuple[int, ...], block: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of values, scale and, in nvfp4, global_scale of matrices of `shape`."""
    *lead, out, into = shape
    blocks = (*lead, -(-out // block[0]), -(-into // block[1]))
    scale = {"fp8_tensor": tuple(lead), "fp8_channel": (*lead, out)}.get(kind, blocks)
    if kind == "nvfp4":
        return {"values": (*lead, out, -(-into // 2)), "scale": scale, "global_scale": tuple(lead)}
    return {"values": tuple(shape), "scale": scale}


def largest_magnitudes(x: np.ndarray, kind: str, block: tuple[int, int] | None = None) -> np.ndarray:
    """The largest |x| (float32) of the numbers that share a scale, in the scale's shape; NaN if one is not finite."""
    a = _magnitude(x)
    a = np.where(np.isfinite(a), a, np.float32(np.nan))
    if kind == "fp8_tensor":
        return a.max(axis=(-2, -1), initial=0)
    if kind == "fp8_channel":
        return a.max(axis=-1, initial=0)
    rows, columns = block or block_of(kind)
    return _split(a, rows, columns).max(axis=(-3, -1), initial=0)


def float32_scale(largest: Any, by: float = FORMATS["e4m3"].largest, *, inverse: bool = False) -> np.ndarray:
    """The float32 nearest to largest / by, at least 2^-117, or to its inverse; NaN where `largest` is not finite.

    With `by` = 448 that is the scale of a weight, of a product's input (`input_scale`) and of the key/value cache
    (`k_scale`, `v_scale`) in FP8; with 6 · 448 (`nvfp4_bound`) the global scale of nvfp4, for inputs too.
    """
    largest = np.asarray(largest, np.float64)
    scale = np.maximum(largest / by, 2.0**SMALLEST_POWER)
    scale = (1 / scale if inverse else scale).astype(np.float32)
    return np.where(np.isfinite(largest), scale, np.float32(np.nan))


def nvfp4_bound(largest_scale: float = LARGEST_SCALE) -> float:
    """The largest magnitude over the global scale; largest_scale: of a block's, 256 for four-over-six."""
    return FORMATS["e2m1"].largest * largest_scale


def encode(
    x: np.ndarray,
    kind: str,
    *,
    largest: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    global_scale: np.ndarray | None = None,
    inverse: bool = False,
    block: tuple[int, int] | None = None,
) -> tuple[Stored, Lost]:
    """Matrices x (…, out, in) in a format.

    largest: the magnitude that becomes the format's largest number, in the scale's shape; None: that of the numbers
    that share a scale. scale: stored scales, in place of `largest`. global_scale: of nvfp4; None: that of the matrix's
    largest magnitude, by 6 · 448. Raises ValueError for shapes that do not fit.
    """
    block = block or block_of(kind)
    if x.ndim < 2:
        raise ValueError(f"x is {x.shape}; expected matrices (…, out, in)")
    if largest is None and scale is None:
        largest = largest_magnitudes(x, kind, block)
    lost = (0, 0)
    if kind != "nvfp4":
        scale = float32_scale(largest) if scale is None else np.asarray(scale)
        by = scale.astype(np.float64)
    else:
        if global_scale is None:
            global_scale = float32_scale(largest_magnitudes(x, "fp8_tensor"), nvfp4_bound(), inverse=inverse)
        global_scale = np.asarray(global_scale, np.float32)
        if scale is None:
            scale, lost = _block_scales(np.asarray(largest, np.float64), global_scale, inverse)
        by = np.asarray(scale).astype(np.float64)
    form = FORMATS["e2m1" if kind == "nvfp4" else "e4m3"]
    spread = _spread(by, kind, x.shape, block)
    x64 = _flushed(x).astype(np.float64)
    if global_scale is not None:
        spread, x64 = _with_global(spread, x64, global_scale[..., None, None].astype(np.float64), inverse)
    values, saturated = _nearest(x64, spread, form)
    bad = ~np.isfinite(x64)
    shared = np.asarray(scale)
    if kind == "nvfp4":
        shared = _spoiled(shared, bad, block)
        values = _packed(values)
    else:
        values = np.where(bad, np.nan, values).astype(E4M3)
    stored = Stored(
        format=kind, values=values, scale=shared, global_scale=global_scale, inverse=inverse, block=block,
        shape=x.shape, dtype=x.dtype.name,
    )  # fmt: skip
    return stored, _count(x, stored, saturated, lost)


def decode(stored: Stored, dtype: Any = FLOAT32) -> np.ndarray:
    """The matrices (…, out, in): the float32 nearest to each exact product, then in `dtype`."""
    if stored.format == "nvfp4":
        values = unpack(stored.values, stored.shape[-1])
    else:
        values = stored.values.astype(np.float32)
    scale = spread_scale(stored)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinite scales are decoded as such
        found = values * scale
        if stored.global_scale is not None:
            whole = stored.global_scale[..., None, None]
            found = found / whole if stored.inverse else found * whole
        return found.astype(dtype, copy=False)


def unpack(packed: np.ndarray, columns: int) -> np.ndarray:
    """E2M1 numbers (…, columns) in float32 from bytes of two, the first in the low four bits."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return CODES[pairs.reshape(*packed.shape[:-1], -1)[..., :columns]]


def _packed(values: np.ndarray) -> np.ndarray:
    """The inverse of `unpack`."""
    size = np.abs(values)
    codes = np.searchsorted(CODES[:8], np.where(np.isfinite(size), size, 0)).astype(np.uint8)
    codes |= np.signbit(values).astype(np.uint8) << 3
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., ::2] | codes[..., 1::2] << 4


def _block_scales(largest: np.ndarray, global_scale: np.ndarray, inverse: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """nvfp4's E4M3 scales for blocks' largest magnitudes (float64), and how many became 0 or were beyond 448."""
    top = np.full_like(largest, FORMATS["e2m1"].largest)
    whole = global_scale[..., None, None].astype(np.float64)
    divisor, dividend = _with_global(top, largest, whole, inverse)
    found, saturated = _nearest(dividend, divisor, FORMATS["e4m3"])
    spoiled = ~np.isfinite(largest) | ~np.isfinite(whole)
    scale = np.where(spoiled, np.nan, found).astype(E4M3)
    return scale, (int(np.sum((found == 0) & (largest > 0) & ~spoiled)), int(np.sum(saturated & ~spoiled)))


def _with_global(scale: np.ndarray, x: np.ndarray, whole: np.ndarray, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Divisor and dividend (float64, exact) of a quotient by scale · global scale, or by scale / global scale."""
    return (scale, x * whole) if inverse else (scale * whole, x)


def _nearest(x: np.ndarray, scale: np.ndarray, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """The format's numbers nearest to x / scale (float64), 0 where scale is 0, and which of them were beyond it."""
    with np.errstate(all="ignore"):  # x or a scale may not be finite; the callers spoil what they divide
        ratio = np.where(scale == 0, 0.0, np.abs(x) / np.abs(scale))
        ratio = np.where(np.isfinite(ratio), ratio, 0.0)
    unit = np.exp2(np.maximum(np.frexp(ratio)[1] - 1, form.lowest) - form.fraction)
    size = np.minimum(np.rint(ratio / unit) * unit, form.largest)  # rint: ties to even
    return np.copysign(size, x), ratio > form.largest * BEYOND


def _count(x: np.ndarray, stored: Stored, saturated: np.ndarray, lost: tuple[int, int]) -> Lost:
    values = unpack(stored.values, x.shape[-1]) if stored.format == "nvfp4" else stored.values.astype(np.float32)
    finite = np.isfinite(x)
    flushed = (values == 0) & (x != 0) & finite
    return Lost(
        x.size, int(np.sum(x == 0)), int(flushed.sum()), int((saturated & finite).sum()), int((~finite).sum()),
        stored.scale.size, *lost,
    )  # fmt: skip


def _spoiled(scale: np.ndarray, bad: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """nvfp4's scales, NaN for blocks with a number that is not finite: its elements have no NaN."""
    hit = _split(bad, *block).any(axis=(-3, -1))
    return np.where(hit, np.uint8(E4M3_NAN), scale.view(np.uint8)).view(E4M3)


def spread_scale(stored: Stored) -> np.ndarray:
    """The scales of FP8 by number, float32, broadcastable to the matrices' shape."""
    return _spread(stored.scale.astype(np.float32), stored.format, stored.shape, stored.block)


def _spread(scale: np.ndarray, kind: str, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """The scales by number, broadcastable to `shape`."""
    if kind == "fp8_tensor":
        return scale[..., None, None]
    if kind == "fp8_channel":
        return scale[..., None]
    for axis, size in ((-2, block[0]), (-1, block[1])):
        scale = np.repeat(scale, size, axis=axis) if size > 1 else scale
    return scale[..., : shape[-2], : shape[-1]]


def _split(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """x (…, out, in), filled up with zeros, as (…, blocks, rows, blocks, columns)."""
    *lead, out, into = x.shape
    filled = np.pad(x, [(0, 0)] * len(lead) + [(0, -out % rows), (0, -into % columns)])
    return filled.reshape(*lead, math.ceil(out / rows), rows, math.ceil(into / columns), columns)


def _magnitude(x: np.ndarray) -> np.ndarray:
    return np.abs(_flushed(x))


def _flushed(x: np.ndarray) -> np.ndarray:
    """x in float32, with zeros for numbers below its normal range."""
    x = np.asarray(x).astype(np.float32)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
