"""What top_k, top_p and min_p leave, against loops over their definitions and sets by hand."""

import jax
import numpy as np
import pytest

from orogen.infer.restrict import restricted

ALL = 2**31 - 1
EIGHTHS = [0.5, 0.25, 0.125, 0.0625, 0.0625]
_restricted = jax.jit(restricted)


def kept(scaled_bv, *, top_k=ALL, top_p=1.0, min_p=0.0) -> np.ndarray:
    """(b, v) bool; settings are numbers, or one per row."""
    scaled_bv = np.asarray(scaled_bv, np.float32)
    rows = len(scaled_bv)
    settings = [np.full(rows, top_k, np.int32), np.full(rows, top_p, np.float32), np.full(rows, min_p, np.float32)]
    left_bv = np.asarray(_restricted(scaled_bv, *settings))
    left = left_bv > -np.inf
    np.testing.assert_array_equal(left_bv[left], scaled_bv[left])
    return left


def defined(scaled_v, top_k, top_p, min_p) -> list[int]:
    """The indices that remain, by a loop over the tokens from the most likely on."""
    order = sorted(range(len(scaled_v)), key=lambda i: (-scaled_v[i], i))
    order = [i for i in order if scaled_v[i] > -np.inf][:top_k]
    weights = {i: float(np.exp(np.float64(scaled_v[i]))) for i in order}
    total, mass, left = sum(weights.values()), 0.0, []
    for i in order:
        if left and top_p < 1 and mass >= top_p * total:
            break
        left.append(i)
        mass += weights[i]
    return sorted(i for i in left if weights[i] >= min_p)


@pytest.mark.parametrize("size", [1, 2, 37, 128])
def test_sets_are_those_of_the_definition(size):
    random = np.random.default_rng(size)
    rows = 60
    scaled_bv = np.round(random.normal(size=(rows, size)) * random.choice([0.3, 2, 20], (rows, 1)), 1)
    scaled_bv[random.random((rows, size)) < 0.2] = -np.inf
    scaled_bv[:, random.integers(size)] = 1
    scaled_bv = (scaled_bv - scaled_bv.max(-1, keepdims=True)).astype(np.float32)
    top_k_b = random.choice([1, 2, 5, 30, size, 1000, ALL], rows).astype(np.int32)
    # Not a sum of a few weights: whether a set reaches its mass must not hang on the last bit.
    top_p_b = random.choice([1e-30, 0.1237, 0.5013, 0.9071, 0.99917, 1], rows).astype(np.float32)
    min_p_b = random.choice([0, 0.0503, 0.3017, 1], rows).astype(np.float32)
    left_bv = kept(scaled_bv, top_k=top_k_b, top_p=top_p_b, min_p=min_p_b)
    expected = [defined(*row) for row in zip(scaled_bv, top_k_b, top_p_b, min_p_b, strict=True)]
    assert [np.flatnonzero(left).tolist() for left in left_bv] == expected


# The smallest set of most likely tokens whose mass reaches top_p, by hand.
NUCLEI = [
    (EIGHTHS, 1.0, [0, 1, 2, 3, 4]),
    (EIGHTHS, 0.95, [0, 1, 2, 3, 4]),
    (EIGHTHS, 0.9375, [0, 1, 2, 3]),  # reached exactly by the first of two equal tokens
    (EIGHTHS, 0.9, [0, 1, 2, 3]),
    (EIGHTHS, 0.875, [0, 1, 2]),
    (EIGHTHS, 0.75, [0, 1]),
    (EIGHTHS, 0.7, [0, 1]),
    (EIGHTHS, 0.5, [0]),
    (EIGHTHS, 0.51, [0, 1]),
    (EIGHTHS, 1e-37, [0]),
    ([0.125] * 8, 0.5, [0, 1, 2, 3]),
    ([0.125] * 8, 0.51, [0, 1, 2, 3, 4]),
    ([0.0625, 0.25, 0.5, 0.125, 0.0625], 0.9, [0, 1, 2, 3]),
    ([0.25, 0.0, 0.5, 0.25, 0.0], 0.75, [0, 2]),
    ([0.0, 0.5, 0.5], 1.0, [1, 2]),
]


@pytest.mark.parametrize(("probabilities", "top_p", "nucleus"), NUCLEI)
def test_the_nucleus_is_the_smallest_set_that_reaches_its_mass(probabilities, top_p, nucleus):
    with np.errstate(divide="ignore"):
        scaled_v = np.log(np.float32(probabilities)) - np.log(np.float32(max(probabilities)))
    assert np.flatnonzero(kept([scaled_v], top_p=top_p)).tolist() == nucleus


@pytest.mark.parametrize(("top_k", "left"), [(1, [2]), (2, [2, 4]), (3, [0, 2, 4]), (4, [0, 1, 2, 4]), (9, range(5))])
def test_of_equal_tokens_the_lower_indices_are_among_the_k(top_k, left):
    assert np.flatnonzero(kept([[-1, -1, 0, -1, 0]], top_k=top_k)).tolist() == list(left)


def test_top_p_counts_what_top_k_has_left():
    """Of 0.4, 0.3, 0.3 the first two have 4/7 and 3/7."""
    scaled_v = np.log(np.float32([0.4, 0.3, 0.3])) - np.log(np.float32(0.4))
    assert kept([scaled_v], top_k=2, top_p=0.55).tolist() == [[True, False, False]]
    assert kept([scaled_v], top_p=0.55).tolist() == [[True, True, False]]


def test_min_p_is_a_share_of_the_largest_probability():
    scaled_v = np.log(np.float32([0.5, 0.3, 0.2]) / np.float32(0.5))
    assert kept([scaled_v] * 4, min_p=[0.3, 0.5, 0.7, 1]).sum(-1).tolist() == [3, 2, 1, 1]
    assert kept([[0, 0, -5]], min_p=1).tolist() == [[True, True, False]]


@pytest.mark.parametrize("row", [[0, -np.inf, -np.inf], [-np.inf, 0, -np.inf], [0, -3e38, -1e-45], [-0.0, 0.0, -1]])
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-38}, {"min_p": 1}, {"top_k": ALL, "top_p": 0.99}])
def test_one_token_always_stays(row, settings):
    left_v = kept([row], **settings)[0]
    assert left_v.any()
    assert left_v[int(np.argmax(row))]


def test_the_mass_of_a_large_vocabulary_is_that_of_a_sort():
    scaled_v = np.random.default_rng(3).normal(size=20_011).astype(np.float32) * 3
    scaled_v -= scaled_v.max()
    for top_p in (0.3, 0.9, 0.999):
        falling = np.sort(np.exp(scaled_v.astype(np.float64)))[::-1]
        count = int(np.searchsorted(np.cumsum(falling), top_p * falling.sum())) + 1
        assert abs(int(kept([scaled_v], top_p=top_p).sum()) - count) <= 1
