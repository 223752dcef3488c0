"""Rotary positions: by hand, against complex numbers in float64, relative, and YaRN's frequencies on paper.

Letters: b batch, t time, h heads, k head size, f frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.config.model import ModelConfig
from orogen.layers.rotary import Rotary, make_rotary, mscale

SIZE = 6
POSITIONS = np.array([[0, 1, 2, 7, 0], [3, 1, 40, 41, 42]], np.int32)


def config(**changes) -> ModelConfig:
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 10, "rope_theta": 100.0, **changes}
    return ModelConfig(pattern="*", vocab_size=7, hidden_size=8, **sizes)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("interleave", [False, True])
def test_quarter_turns_by_hand(interleave):
    # Two pairs that turn by a right angle and by half a turn per token; the last number of the head stays.
    rotary = Rotary((math.pi / 2, math.pi), 2.0, interleave)
    x_bthk = jnp.array([1.0, 3.0, 2.0, 4.0, 9.0] if interleave else [1.0, 2.0, 3.0, 4.0, 9.0]).reshape(1, 1, 1, 5)
    turned = rotary(jnp.tile(x_bthk, (1, 3, 1, 1)), jnp.arange(3)[None])
    # Pairs (1, 3) and (2, 4), twice as long: (1, 3) -> (-3, 1) -> (-1, -3), (2, 4) -> (-2, -4) -> (2, 4)
    expected = [[2, 4, 6, 8, 9], [-6, -4, 2, -8, 9], [-2, 4, -6, 8, 9]]
    np.testing.assert_allclose(turned[0, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("size", [SIZE, 10])
def test_equals_complex_products(size, interleave):
    x_bthk = random(*POSITIONS.shape, 3, 10)
    rotary = make_rotary(config(rope_interleave=interleave), size)
    pairs = x_bthk[..., :size].astype(np.float64)
    halves = np.moveaxis(pairs.reshape(*pairs.shape[:-1], -1, 2), -1, 0) if interleave else np.split(pairs, 2, -1)
    angle = POSITIONS[..., None, None] * 100.0 ** (-2 * np.arange(size // 2) / size)
    turned = (halves[0] + 1j * halves[1]) * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag, x_bthk[..., size:]], -1)
    # Angles up to 42, rounded to float32.
    np.testing.assert_allclose(rotary(x_bthk, POSITIONS), expected, atol=42 * 3e-7)


@pytest.mark.parametrize("interleave", [False, True])
def test_products_depend_on_the_distance_alone(interleave):
    rotary = make_rotary(config(rope_interleave=interleave), SIZE)
    q_bthk, k_bthk = random(1, 1, 2, 8), random(1, 1, 2, 8, seed=1)

    def product(q_position: int, k_position: int):
        q, k = (rotary(x, jnp.array([[p]])) for x, p in ((q_bthk, q_position), (k_bthk, k_position)))
        return (q * k).sum(-1)

    np.testing.assert_allclose(product(9, 4), product(25, 20), rtol=1e-4)
    assert not np.allclose(product(9, 4), product(9, 5), rtol=1e-2)
    assert not np.allclose(product(9, 4), product(4, 9), rtol=1e-2)
    np.testing.assert_allclose(product(7, 7), (q_bthk * k_bthk).sum(-1), rtol=1e-5)


def test_bfloat16_turns_in_float32():
    rotary, x_bthk = make_rotary(config(), SIZE), jnp.asarray(random(1, 1, 2, 8), jnp.bfloat16)
    # In bfloat16 the position itself would be 1000, and the first angle wrong by 3.
    turned = rotary(x_bthk, jnp.array([[1003]]))
    assert turned.dtype == jnp.bfloat16
    exact = rotary(x_bthk.astype(jnp.float32), jnp.array([[1003]]))
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_yarn_by_hand():
    # theta = 100 and 10 numbers: frequencies 10^(-2f/5). In 63 tokens frequency f turns 63 / 2 pi · 10^(-2f/5) times;
    # the betas are those of f = 1 and f = 3. So 0 and 1 stay, 3 and 4 are divided by 4, and 2 is half way between.
    yarn = {"yarn_factor": 4.0, "yarn_original_positions": 63, "yarn_truncate": False}
    turns = {"yarn_beta_fast": 63 / (2 * math.pi * 10**0.4), "yarn_beta_slow": 63 / (2 * math.pi * 10**1.2)}
    rotary = make_rotary(config(**yarn, **turns), 10)
    shrink = [1, 1, (1 + 1 / 4) / 2, 1 / 4, 1 / 4]
    np.testing.assert_allclose(rotary.frequencies, [10 ** (-2 * f / 5) * s for f, s in enumerate(shrink)], rtol=1e-6)
    assert rotary.magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_truncates_to_whole_frequencies():
    # The same bounds, moved inside: 1.25 and 2.75 become 1 and 3 again.
    bounds = [63 / (2 * math.pi * 10 ** (2 * f / 5)) for f in (1.25, 2.75)]
    yarn = {"yarn_factor": 4.0, "yarn_original_positions": 63, "yarn_beta_fast": bounds[0], "yarn_beta_slow": bounds[1]}
    whole, exact = (make_rotary(config(**yarn, yarn_truncate=t), 10).frequencies for t in (True, False))
    assert whole[2] == pytest.approx(exact[2])
    assert whole[1] == exact[1] and whole[3] == exact[3]
    shifted = yarn | {"yarn_beta_fast": 63 / (2 * math.pi * 10 ** (2 * 1.75 / 5))}
    whole, exact = (make_rotary(config(**shifted, yarn_truncate=t), 10).frequencies for t in (True, False))
    assert whole[2] == pytest.approx(10**-0.8 * (1 + 1 / 4) / 2)
    assert exact[2] == pytest.approx(10**-0.8 * (3 / 4 + 1 / 4 / 4))  # a quarter of the way from 1.75 to 2.75


@pytest.mark.parametrize(
    ("bounds", "shares"),
    [
        ((3, 7), [0, 0, 0, 0, 1 / 4]),  # past the last frequency, up to the number of them twice over
        ((3, 20), [0, 0, 0, 0, 1 / 6]),  # but no further than 9
        ((-2, 2), [0, 1 / 2, 1, 1, 1]),  # nor before the first
        ((2, 2), [0, 0, 0, 1, 1]),  # a step
    ],
)
def test_yarn_bounds_its_range(bounds, shares):
    fast, slow = (63 / (2 * math.pi * 10 ** (2 * f / 5)) for f in bounds)
    turns = {"yarn_beta_fast": fast, "yarn_beta_slow": slow, "yarn_truncate": False}
    rotary = make_rotary(config(yarn_factor=4.0, yarn_original_positions=63, **turns), 10)
    expected = [10 ** (-2 * f / 5) * (1 - 3 / 4 * s) for f, s in enumerate(shares)]
    np.testing.assert_allclose(rotary.frequencies, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, 0.1 * math.log(40) + 1),
        ({"yarn_mscale": 0.7}, 0.1 * math.log(40) + 1),
        ({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 1.0}, 1),
        ({"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.5}, (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)),
    ],
)
def test_yarn_magnitude(weights, expected):
    rotary = make_rotary(config(yarn_factor=40.0, yarn_original_positions=64, **weights), SIZE)
    assert rotary.magnitude == pytest.approx(expected)
    x_bthk = random(1, 1, 1, 10)
    turned = rotary(x_bthk, jnp.array([[3]]))
    assert jnp.linalg.norm(turned[..., :SIZE]) == pytest.approx(expected * np.linalg.norm(x_bthk[..., :SIZE]), rel=1e-5)
    np.testing.assert_array_equal(turned[..., SIZE:], x_bthk[..., SIZE:])


def test_mscale_grows_with_the_logarithm():
    assert mscale(1.0, 3.0) == 1
    assert mscale(math.e**2, 0.5) == pytest.approx(1.1)


def test_gradient_is_the_turn_back():
    rotary, x_bthk = make_rotary(config(), 10), random(*POSITIONS.shape, 3, 10)
    y_bthk, transpose = jax.vjp(lambda x: rotary(x, POSITIONS), x_bthk)
    np.testing.assert_allclose(transpose(y_bthk)[0], x_bthk, atol=1e-5)
