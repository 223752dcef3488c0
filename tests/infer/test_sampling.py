"""Which tokens are drawn, and how often: nuclei by hand, temperatures at the ends of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.infer.sampling import sample

DRAWS = 4000
HALVES = [0.5, 0.25, 0.125, 0.0625, 0.0625]  # sums are exact in float32


def drawn(probabilities, *, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    """How often each token is drawn, of DRAWS."""
    logits_bv = jnp.log(jnp.tile(jnp.array(probabilities, jnp.float32), (DRAWS, 1)))
    chosen_b = sample(logits_bv, jax.random.key(0), temperature=temperature, top_p=top_p)
    return np.bincount(chosen_b, minlength=len(probabilities)) / DRAWS


# The smallest set of most likely tokens whose mass reaches top_p, by hand.
NUCLEI = [
    (HALVES, 1.0, [0, 1, 2, 3, 4]),
    (HALVES, 0.95, [0, 1, 2, 3, 4]),
    (HALVES, 0.9375, [0, 1, 2, 3]),  # reached exactly by the first of two equal tokens
    (HALVES, 0.9, [0, 1, 2, 3]),
    (HALVES, 0.875, [0, 1, 2]),
    (HALVES, 0.8, [0, 1, 2]),
    (HALVES, 0.75, [0, 1]),
    (HALVES, 0.7, [0, 1]),
    (HALVES, 0.5, [0]),
    (HALVES, 0.51, [0, 1]),
    (HALVES, 1e-30, [0]),
    (HALVES, 0.0, [0]),
    ([0.125] * 8, 0.5, [0, 1, 2, 3]),
    ([0.125] * 8, 0.51, [0, 1, 2, 3, 4]),
    ([0.0625, 0.25, 0.5, 0.125, 0.0625], 0.9, [0, 1, 2, 3]),
    ([0.25, 0.0, 0.5, 0.25, 0.0], 0.75, [0, 2]),
    ([0.0, 0.5, 0.5], 1.0, [1, 2]),
]


@pytest.mark.parametrize(("probabilities", "top_p", "nucleus"), NUCLEI)
def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass(probabilities, top_p, nucleus):
    found = drawn(probabilities, top_p=top_p)
    assert np.flatnonzero(found).tolist() == nucleus
    kept = np.array(probabilities)[nucleus]
    np.testing.assert_allclose(found[nucleus], kept / kept.sum(), atol=0.04)


def test_temperature_comes_before_the_nucleus():
    """At temperature 0.5 the odds 4 : 2 : 1 become 16 : 4 : 1."""
    odds = [4 / 7, 2 / 7, 1 / 7]
    np.testing.assert_allclose(drawn(odds, temperature=0.5), [16 / 21, 4 / 21, 1 / 21], atol=0.03)
    assert np.flatnonzero(drawn(odds, temperature=0.5, top_p=0.8)).tolist() == [0, 1]
    assert np.flatnonzero(drawn(odds, temperature=0.5, top_p=0.76)).tolist() == [0]


LOGITS = [-3.0, 1e4, 2.5, 1e4, 1e4 - 1]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-45, 1e-39, 1e-38, 1.17e-38])
@pytest.mark.parametrize("top_p", [1.0, 0.3])
def test_temperatures_that_devices_take_for_zero_are_greedy(temperature, top_p):
    for seed in range(4):
        chosen = sample(jnp.array([LOGITS]), jax.random.key(seed), temperature=temperature, top_p=top_p)
        assert chosen.tolist() == [1]


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e-6, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e30, -1.0])
def test_small_temperatures_draw_the_largest(temperature, scale):
    logits_bv = jnp.tile(jnp.array([-3.0, 7.0, 2.5, 6.0]) * scale, (50, 1))
    chosen_b = sample(logits_bv, jax.random.key(0), temperature=temperature, top_p=1.0)
    assert set(chosen_b.tolist()) == {1 if scale > 0 else 0}


@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e300])
def test_large_temperatures_draw_evenly_but_never_what_is_excluded(temperature):
    np.testing.assert_allclose(
        drawn([0.7, 0.0, 0.2, 0.1], temperature=temperature), [1 / 3, 0, 1 / 3, 1 / 3], atol=0.04
    )


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1.0, 1e300])
def test_an_infinite_logit_is_drawn(temperature):
    logits_bv = jnp.tile(jnp.array([0.0, -jnp.inf, jnp.inf, 3.0]), (50, 1))
    assert set(sample(logits_bv, jax.random.key(0), temperature=temperature, top_p=1.0).tolist()) == {2}


def test_rows_are_drawn_apart():
    chosen_b = sample(jnp.zeros((64, 100)), jax.random.key(0), temperature=1.0, top_p=0.999)
    assert len(set(chosen_b.tolist())) > 30
