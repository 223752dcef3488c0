"""Quantised weights as files hold them, against the formats' definitions in fractions (`reference.py`), to the bit."""

from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tests.precision import reference

from orogen.config.rounded import Operand
from orogen.precision import rounding
from orogen.precision.stored import (
    STORED,
    decode,
    encode,
    float32_scale,
    largest_magnitudes,
    nvfp4_bound,
    unpack,
)

RNG = np.random.default_rng(3)
DRAWN = (RNG.normal(size=(5, 37)) * np.exp(2 * RNG.normal(size=(5, 37)))).astype(np.float32)
THIRDS = (RNG.integers(-12, 13, size=(5, 37)) / np.float32(3)).astype(np.float32)
SPECIAL = DRAWN.copy()
SPECIAL[0, :16], SPECIAL[1, 16:32], SPECIAL[2, :16] = 0, 1e-40, 1e-30  # a zero, a denormal and a flushed block
SPECIAL[3, 3], SPECIAL[4, 4], SPECIAL[4, 36] = -3e38, 2**-126, -0.0
ARRAYS = {"drawn": DRAWN, "thirds": THIRDS, "special": SPECIAL, "zeros": np.zeros((3, 20), np.float32)}
BLOCKS = {"fp8_tensor": (5, 37), "fp8_channel": (1, 37), "fp8_block": (2, 16), "nvfp4": (1, 16)}
E4M3 = ml_dtypes.float8_e4m3fn


def defined(x, kind):
    """(codes as numbers, scales in a grid of blocks, global scale) by the definition, one number at a time."""
    x = reference.flushed(x)
    block = {**BLOCKS, "fp8_tensor": x.shape, "fp8_channel": (1, x.shape[1])}[kind]
    grid = tuple(-(-size // b) for size, b in zip(x.shape, block, strict=True))
    values, scales = np.zeros(x.shape), np.zeros(grid)
    whole = reference.divided(np.abs(x).max(), 6 * 448) if kind == "nvfp4" else np.float32(1)
    for at in reference.each_block(x, block):
        place = tuple(part.start // b for part, b in zip(at, block, strict=True))
        largest = float(np.abs(x[at]).max())
        if kind == "nvfp4":
            scales[place] = reference.nearest(largest, 6 * Fraction(float(whole)), "e4m3")
        else:
            scales[place] = reference.divided(largest, 448)
        by, form = Fraction(scales[place]) * Fraction(float(whole)), "e2m1" if kind == "nvfp4" else "e4m3"
        for i, v in np.ndenumerate(x[at]):
            values[at][i] = reference.nearest(float(v), by, form) if by else np.copysign(0.0, v)
    return values, scales, whole


def numbers_of(stored):
    if stored.format == "nvfp4":
        return unpack(stored.values, stored.shape[-1])
    return stored.values.astype(np.float32)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("kind", STORED)
def test_numbers_and_scales_are_the_definition(name, kind):
    x = ARRAYS[name]
    stored, lost = encode(x, kind, block=BLOCKS[kind] if kind == "fp8_block" else None)
    values, scales, whole = defined(x, kind)
    found = numbers_of(stored)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
    np.testing.assert_array_equal(stored.scale.astype(np.float64).ravel(), scales.ravel())
    assert stored.global_scale is None or float(stored.global_scale) == float(whole)
    spread = np.repeat(np.repeat(scales, BLOCKS[kind][0], 0), BLOCKS[kind][1], 1)[: x.shape[0], : x.shape[1]]
    with np.errstate(over="ignore"):
        exact = (values * spread * np.float64(whole)).astype(np.float32)  # exact in float64: at most 30 bits
    np.testing.assert_array_equal(decode(stored), exact)
    assert lost.numbers == x.size and lost.zeros == int((x == 0).sum()) and lost.nonfinite == 0
    assert lost.flushed == int(((values == 0) & (x != 0)).sum())
    # nvfp4's block scales are rounded, some of them down, so that the block's largest number is beyond 6.
    limit = (6 if kind == "nvfp4" else 448) * (1 + 1e-5) * spread * np.float64(whole)
    assert lost.saturated == int((np.abs(reference.flushed(x)).astype(np.float64) > limit)[limit > 0].sum())


def test_bytes_worked_by_hand():
    """Low four bits first; the sign is the fourth bit; an odd last number stands alone. 0.75 · 448 = 336 in E4M3."""
    x = np.array([[1, 6, -0.5, 0, 3, -4, 2, 1.5, 0.5]], np.float32) * 448
    stored, _ = encode(x, "nvfp4")
    assert [hex(b) for b in stored.values.ravel()] == ["0x72", "0x9", "0xe5", "0x34", "0x1"]
    assert stored.global_scale == 1 and stored.scale.tolist() == [[448]]
    x = np.array([[0.75, -1.0]], np.float32)
    stored, _ = encode(x, "fp8_tensor")
    assert stored.scale == np.float32(1 / 448) and stored.values.view(np.uint8).tolist() == [[0x7A, 0xFE]]
    # With a power of two for a reciprocal both conventions hold the same numbers.
    one, _ = encode(DRAWN, "nvfp4", global_scale=np.float32(2.0**-7))
    other, _ = encode(DRAWN, "nvfp4", global_scale=np.float32(2.0**7), inverse=True)
    assert one.values.tobytes() == other.values.tobytes() and one.scale.tobytes() == other.scale.tobytes()
    np.testing.assert_array_equal(decode(one), decode(other))


def test_ties_go_to_even():
    fp8, _ = encode(np.array([[1.0625, -1.1875, 2.0**-10, 3 * 2.0**-10]]), "fp8_tensor", scale=np.float32(1))
    assert decode(fp8).tolist() == [[1, -1.25, 0, 2.0**-8]]
    fp4, lost = encode(np.array([[0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5, 448 * 6]]), "nvfp4", global_scale=np.float32(1))
    assert decode(fp4)[0, :7].tolist() == [0, 0, 0, -0.0, 0, 0, 0] and lost.flushed == 7
    ones = np.array([[1.0]]).astype(E4M3)
    fp4, _ = encode(np.array([[0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5]]), "nvfp4", scale=ones, global_scale=np.float32(1))
    assert decode(fp4).tolist() == [[0, 1, 1, -2, 2, 4, 4]]


def test_the_inverse_global_scale_divides():
    scale = np.float32(6 * 448 / np.float64(np.abs(DRAWN).max()))
    assert float32_scale(np.abs(DRAWN).max(), nvfp4_bound(), inverse=True) == scale
    stored, _ = encode(DRAWN, "nvfp4", inverse=True)
    assert stored.global_scale == scale
    values, found = numbers_of(stored), decode(stored)
    for (i, j), v in np.ndenumerate(DRAWN):
        block = float(np.abs(DRAWN[i, j // 16 * 16 : j // 16 * 16 + 16]).max())
        by = Fraction(reference.nearest(block, 6 / Fraction(float(scale)), "e4m3")) / Fraction(float(scale))
        assert values[i, j] == (reference.nearest(float(v), by, "e2m1") if by else 0)
        assert found[i, j] == np.float32(float(Fraction(float(values[i, j])) * by))


def test_codes_are_those_of_ml_dtypes():
    packed = np.arange(256, dtype=np.uint8).reshape(8, 32)
    low, high = (packed & 15).view(ml_dtypes.float4_e2m1fn), (packed >> 4).view(ml_dtypes.float4_e2m1fn)
    found = unpack(packed, 64)
    np.testing.assert_array_equal(found[:, ::2], low.astype(np.float32))
    np.testing.assert_array_equal(found[:, 1::2], high.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(found[:, ::2]), (packed & 8) > 0)
    stored, _ = encode(DRAWN, "fp8_tensor")
    quotient = DRAWN.astype(np.float64) / float(stored.scale)
    assert stored.values.tobytes() == quotient.astype(np.float32).astype(E4M3).tobytes()


@pytest.mark.parametrize("name", ["drawn", "special"])
def test_the_stored_numbers_are_the_emulated_ones(name):
    """What a recipe emulates in training is what the files then hold."""
    x = ARRAYS[name]
    largest = jnp.max(jnp.abs(x), keepdims=True)
    for kind, operand, blocks in (
        ("fp8_tensor", Operand(element="e4m3", scale="tensor"), (1, 1)),
        ("nvfp4", Operand(element="e2m1", scale="two_level", block=16), (1, 16)),
    ):
        emulated = rounding.encode(jnp.asarray(x), operand, blocks, largest)
        stored, _ = encode(x, kind)
        with np.errstate(over="ignore"):
            there = np.float32(np.float64(emulated.value) * np.float64(emulated.scale))
        np.testing.assert_array_equal(decode(stored), there)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_what_shares_its_scale(bad):
    x = DRAWN.copy()
    x[3, 20] = bad
    for kind, spoiled in (
        ("fp8_tensor", np.s_[:, :]),
        ("fp8_channel", np.s_[3:4, :]),
        ("fp8_block", np.s_[2:4, 16:32]),
        ("nvfp4", np.s_[:, :]),
    ):
        stored, lost = encode(x, kind, block=(2, 16) if kind == "fp8_block" else None)
        mask = np.zeros(x.shape, bool)
        mask[spoiled] = True
        np.testing.assert_array_equal(np.isnan(decode(stored)), mask)
        assert lost.nonfinite == 1
    # Under given scales: the number itself in FP8, its block in NVFP4, whose numbers have no NaN.
    fp8, lost = encode(x, "fp8_tensor", scale=np.float32(0.1))
    assert np.isnan(decode(fp8)).sum() == 1 and np.isnan(decode(fp8))[3, 20] and lost.nonfinite == 1
    fp4, lost = encode(x, "nvfp4", global_scale=np.float32(0.01))
    assert np.argwhere(np.isnan(decode(fp4))).tolist() == [[3, j] for j in range(16, 32)]
    assert np.isnan(fp4.scale.astype(np.float32)).sum() == 1 and lost.nonfinite == 1


def test_scales_that_do_not_fit_are_counted():
    x = np.zeros((2, 48), np.float32)
    x[0, 0], x[0, 16], x[1, 3] = 6 * 448, 6 * 2.0**-11, 7 * 448
    stored, lost = encode(x, "nvfp4", global_scale=np.float32(1))
    # 2^-11 is below half of E4M3's smallest 2^-9; 7 · 448 / 6 is beyond 448, so the number becomes 6 · 448.
    assert stored.scale.astype(float).tolist() == [[448, 0, 0], [448, 0, 0]]
    assert decode(stored)[1, 3] == 6 * 448 and decode(stored)[0, 16] == 0
    assert lost.scales == 6 and lost.scales_flushed == 1 and lost.scales_saturated == 1
    assert lost.flushed == 1 and lost.saturated == 1
    fp8, lost = encode(x, "fp8_tensor", scale=np.float32(1))
    assert lost.saturated == 2 and decode(fp8)[0, 0] == 448


def test_a_chosen_magnitude_becomes_the_largest_number():
    """Four over six: a block with largest magnitude 4 s is stored with scale s if its largest is said to be 6 s."""
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = 8, 6, 3
    largest = largest_magnitudes(x, "nvfp4")
    assert largest.tolist() == [[8, 0]]
    stored, _ = encode(x, "nvfp4", largest=largest * 1.5, global_scale=np.float32(1))
    assert stored.scale[0, 0] == 2 and numbers_of(stored)[0, :3].tolist() == [4, 3, 1.5]


@pytest.mark.parametrize("kind", STORED)
def test_leading_axes_are_encoded_apart(kind):
    x = np.stack([DRAWN, 3 * THIRDS])
    block = (2, 16) if kind == "fp8_block" else None
    together, lost = encode(x, kind, block=block)
    apart = [encode(one, kind, block=block) for one in x]
    np.testing.assert_array_equal(decode(together), np.stack([decode(one) for one, _ in apart]))
    assert together.scale.tobytes() == b"".join(one.scale.tobytes() for one, _ in apart)
    assert lost == tuple(np.sum([counts for _, counts in apart], axis=0))
    assert together.nbytes == sum(one.nbytes for one, _ in apart)


def test_shapes_that_do_not_fit_are_refused():
    stored, _ = encode(DRAWN, "nvfp4")
    with pytest.raises(ValueError, match=r"nvfp4 of \(5, 38\) has .*\(5, 3\)"):
        type(stored)(**{**vars(stored), "shape": (5, 38), "values": stored.values[:, :-1]})
    with pytest.raises(ValueError, match="format is 'int4'"):
        type(stored)(**{**vars(stored), "format": "int4"})
    with pytest.raises(ValueError, match=r"x is \(37,\)"):
        encode(DRAWN[0], "fp8_tensor")
