"""Rounding with shared scales against the formats' definitions, to the bit, and what it does to numbers that are none.

The definitions are in `reference.py`, in numpy float64 and fractions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.precision import reference

from orogen.config.rounded import Operand
from orogen.precision.rounding import encode, signs, transformed

RNG = np.random.default_rng(0)
# Uneven sizes, so that the last blocks are shorter; magnitudes over ten orders; multiples of a third, whose quotients
# lie on midpoints or next to them.
DRAWN = (RNG.normal(size=(19, 37)) * np.exp(3 * RNG.normal(size=(19, 37)))).astype(np.float32)
THIRDS = (RNG.integers(-12, 13, size=(19, 37)) / np.float32(3)).astype(np.float32)
SPECIAL = DRAWN.copy()
SPECIAL[0, :16], SPECIAL[1, 16:32], SPECIAL[2, :16] = 0, 1e-40, 1e-30  # a zero, a denormal and a flushed block
SPECIAL[3, 3], SPECIAL[4, 4] = -3e38, 2**-126
ARRAYS = {"drawn": DRAWN, "thirds": THIRDS, "special": SPECIAL, "zeros": np.zeros((3, 20), np.float32)}
arrays = pytest.mark.parametrize("name", ARRAYS)
NVFP4 = Operand(element="e2m1", scale="two_level", block=16)
MXFP8 = Operand(element="e4m3", scale="power", block=16)


def encoded(x, operand, blocks, words=None):
    largest = np.max(np.abs(x), keepdims=True)
    return jax.jit(lambda x, largest: encode(x, operand, blocks, largest, words))(x, largest)


def assert_equal(found, values, scale=None):
    np.testing.assert_array_equal(np.asarray(found.value, np.float64), values)
    assert scale is None or float(found.scale.item()) == float(scale)


@arrays
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_a_tensor_with_one_scale(name, kind):
    x = ARRAYS[name]
    assert_equal(encoded(x, Operand(element=kind, scale="tensor"), (1, 1)), *reference.tensor_scaled(x, kind))


@arrays
@pytest.mark.parametrize("blocks", [(1, 16), (16, 16), (16, 1)])
def test_blocks_with_powers_of_two(name, blocks):
    x = ARRAYS[name]
    assert_equal(encoded(x, MXFP8, blocks), reference.power_scaled(x, "e4m3", blocks))


@arrays
@pytest.mark.parametrize(("blocks", "four"), [((1, 16), False), ((16, 16), False), ((16, 1), False), ((1, 16), True)])
def test_blocks_with_two_levels_of_scales(name, blocks, four):
    x = ARRAYS[name]
    operand = Operand(element="e2m1", scale="two_level", block=16, four_over_six=four)
    assert_equal(encoded(x, operand, blocks), *reference.two_level(x, blocks, four))


def test_numbers_worked_by_hand():
    """A block with largest 12 in a tensor with largest 2688: scale 1, then 12 / 6 = 2 and halves of [0 … 6]."""
    x = np.zeros((1, 32), np.float32)
    x[0, :8], x[0, 16] = [12, 0.4, -0.5, 0.51, 2.5, -3.5, 7, 9.9], 2688
    found = encoded(x, NVFP4, (1, 16))
    assert float(found.scale.item()) == 1
    # 0.4 / 2 = 0.2 -> 0; 0.25 ties to 0; 0.255 -> 0.5; 1.25 ties to 1; 1.75 ties to 2; 3.5 ties to 4; 4.95 -> 4.
    assert found.value[0, :8].tolist() == [12, 0, 0, 1, 2, -4, 8, 8]
    assert found.value[0, 16] == 2688
    # A power of two: 448 needs scale 1, the next number above it 2; 449 / 2 rounds to 224 x 2.
    x = np.zeros((2, 16), np.float32)
    x[:, 0] = 448, np.nextafter(np.float32(448), np.float32(449))
    found = encoded(x, MXFP8, (1, 16))
    assert found.unit.ravel().tolist() == [1, 2] and found.value[:, 0].tolist() == [448, 448]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_block_or_its_tensor(value):
    x = DRAWN.copy()
    x[3, 5] = value
    largest = np.full((1, 1), np.inf, np.float32)
    wrong = {
        op.scale: np.isnan(jax.jit(encode, static_argnums=(1, 2))(x, op, blocks, largest).value)
        for op, blocks in ((MXFP8, (1, 16)), (NVFP4, (1, 16)), (Operand(element="e4m3", scale="tensor"), (1, 1)))
    }
    assert wrong["power"].sum() == 16 and wrong["power"][3, :16].all()
    assert wrong["two_level"].all() and wrong["tensor"].all()


def test_what_a_block_cannot_hold_saturates_and_is_counted():
    """E4M3 rounds the block's scale 1.06 to 1, so that its largest number is 6.36 and becomes 6."""
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, 16] = 6.36, 2688
    found = encoded(x, NVFP4, (1, 16))
    assert found.value[0, 0] == 6 and int(found.saturated.sum()) == 1


def test_each_row_may_be_a_tensor_of_its_own():
    rows = np.abs(DRAWN).max(1, keepdims=True)
    found = encode(jnp.asarray(DRAWN), NVFP4, (1, 16), rows)
    for row, value, scale in zip(DRAWN, np.asarray(found.value), np.asarray(found.scale), strict=True):
        values, expected = reference.two_level(row[None], (1, 16))
        np.testing.assert_array_equal(value, values[0])
        assert scale[0] == expected


@pytest.mark.parametrize("size", [2, 16, 64])
def test_the_transform_is_a_hadamard_matrix_and_keeps_products(size):
    x, y = RNG.normal(size=(2, 2 * size, 3))
    known = [*reference.SIGNS, *signs(size)[16:]][:size]
    matrix = np.kron(np.eye(2), reference.hadamard(size, known))
    mine = [np.asarray(transformed(jnp.asarray(a, jnp.float32), size, 0)) for a in (x, y)]
    np.testing.assert_allclose(mine[0], matrix @ x, atol=2e-6)
    np.testing.assert_allclose(mine[0].T @ mine[1], x.T @ y, atol=1e-4)


def test_the_signs_do_not_depend_on_a_generator():
    assert signs(16) == list(reference.SIGNS) and len(signs(128)) == 128 and set(signs(128)) == {-1, 1}


@pytest.mark.parametrize("operand", [MXFP8, NVFP4, Operand(element="e4m3", scale="tensor")])
def test_zeros_alone_have_no_scale_to_count(operand):
    x = np.zeros((2, 32), np.float32)
    blocks = (1, operand.block or 1)
    assert not encoded(x, operand, blocks).unit.any()
    x[0, 3] = 3
    used = np.asarray(encoded(x, operand, blocks).unit > 0)
    assert used.sum() == 1 and used.flat[0]


def test_a_draw_does_not_decide_between_four_and_six():
    """Blocks scaled as the nearest numbers say. A choice between two draws would be by chance."""
    operand = Operand(element="e2m1", scale="two_level", block=16, four_over_six=True)
    words = jnp.asarray(RNG.integers(2**32, size=DRAWN.shape, dtype=np.uint32))
    drawn, nearest = (encoded(DRAWN, operand, (1, 16), w) for w in (words, None))
    np.testing.assert_array_equal(drawn.unit, nearest.unit)
    assert (drawn.value != nearest.value).mean() > 0.1


def test_stochastic_rounding_takes_both_neighbours_and_keeps_the_mean():
    """2.3 lies between 2 and 3 of E2M1, and becomes 3 in 30 % of the cases; 2 and 6 stay."""
    count = 40_000
    x = np.zeros((count, 16), np.float32)
    x[:, :3] = 2.3, 2, -6
    x[0, 3] = 2688  # so that the tensor's scale is 1, and the other blocks' 1
    words = jnp.asarray(RNG.integers(2**32, size=x.shape, dtype=np.uint32))
    found = np.asarray(encoded(x, NVFP4, (1, 16), words).value)[1:]
    assert set(np.unique(found[:, 0])) == {2, 3}
    assert abs(found[:, 0].mean() - 2.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    assert set(np.unique(found[:, 1])) == {2} and set(np.unique(found[:, 2])) == {-6}
