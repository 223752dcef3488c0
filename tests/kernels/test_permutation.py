"""Rows put in order and added up again: every implementation against loops over assignments.

Axes: n tokens, k choices of a token, r rows, d width.
"""

import functools

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from tests.helpers import implementations, several_devices

from orogen.kernels.permutation import SUM, TAKE, sum_rows, take_rows

every_implementation = pytest.mark.parametrize("implementation", implementations(TAKE))
# (tokens, choices, width, rows, share of the assignments that have a row): every row taken; rows and assignments that
# have no partner, with fewer and with more rows than assignments; parts of 1024 columns, and one that overhangs.
SIZES = [(7, 3, 5, 21, 1.0), (9, 2, 8, 11, 0.6), (5, 1, 1030, 17, 0.8), (4, 3, 2048, 12, 1.0), (6, 2, 4, 5, 0.0)]


def draw(*shape: int, seed: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ticket(tokens: int, k: int, rows: int, share: float) -> tuple[Array, Array]:
    """slots (n, k) and source (r,), each other's inverse."""
    rng = np.random.default_rng(6)
    flat, source = np.full(tokens * k, rows), np.full(rows, tokens * k)
    count = int(min(rows, share * tokens * k))
    flat[rng.permutation(tokens * k)[:count]] = rng.permutation(rows)[:count]
    used = np.flatnonzero(flat < rows)
    source[flat[used]] = used
    return jnp.asarray(flat.reshape(tokens, k), jnp.int32), jnp.asarray(source, jnp.int32)


@every_implementation
@pytest.mark.parametrize("tokens, k, width, rows, share", SIZES)
class TestEveryImplementation:
    """Values and gradients, at each of the sizes."""

    def test_rows_are_taken(self, implementation: str, tokens: int, k: int, width: int, rows: int, share: float):
        slots_nk, source_r = ticket(tokens, k, rows, share)
        x_nd, g_rd = draw(tokens, width, seed=0), draw(rows, width, seed=1)
        rows_rd, pullback = jax.vjp(lambda x: take_rows(x, slots_nk, source_r, implementation=implementation), x_nd)
        want, want_gradient = np.zeros((rows, width)), np.zeros((tokens, width))
        for row, assignment in enumerate(np.asarray(source_r)):
            if assignment < tokens * k:
                want[row] = x_nd[assignment // k]
                want_gradient[assignment // k] += g_rd[row]
        np.testing.assert_array_equal(rows_rd, want)
        np.testing.assert_allclose(pullback(g_rd)[0], want_gradient, rtol=0, atol=4e-7 * k)

    def test_rows_are_added_up(self, implementation: str, tokens: int, k: int, width: int, rows: int, share: float):
        slots_nk, source_r = ticket(tokens, k, rows, share)
        rows_rd, w_nk, g_nd = draw(rows, width, seed=0), draw(tokens, k, seed=1), draw(tokens, width, seed=2)
        run = functools.partial(sum_rows, slots_nk=slots_nk, source_r=source_r, implementation=implementation)
        y_nd, pullback = jax.vjp(run, rows_rd, w_nk)
        want, want_rows, want_weights = np.zeros((tokens, width)), np.zeros((rows, width)), np.zeros((tokens, k))
        for (n, j), row in np.ndenumerate(np.asarray(slots_nk)):
            if row < rows:
                want[n] += np.float64(w_nk[n, j]) * np.asarray(rows_rd[row], np.float64)
                want_rows[row] = w_nk[n, j] * g_nd[n]
                want_weights[n, j] = np.asarray(rows_rd[row], np.float64) @ np.asarray(g_nd[n], np.float64)
        got_rows, got_weights = pullback(g_nd)
        # Sums of k and of d products of numbers near one.
        np.testing.assert_allclose(y_nd, want, rtol=0, atol=1e-6 * k)
        np.testing.assert_allclose(got_rows, want_rows, rtol=1e-6)
        np.testing.assert_allclose(got_weights, want_weights, rtol=0, atol=1e-6 * np.sqrt(width) * 4)

    def test_bfloat16_is_rounded_at_the_end(
        self, implementation: str, tokens: int, k: int, width: int, rows: int, share: float
    ):
        slots_nk, source_r = ticket(tokens, k, rows, share)
        rows_rd, w_nk = draw(rows, width, seed=0).astype(jnp.bfloat16), draw(tokens, k, seed=1)
        run = functools.partial(sum_rows, slots_nk=slots_nk, source_r=source_r, implementation=implementation)
        g_nd = draw(tokens, width, seed=2).astype(jnp.bfloat16)
        got, pullback = jax.vjp(run, rows_rd, w_nk)
        want, want_pullback = jax.vjp(run, rows_rd.astype(jnp.float32), w_nk)
        got, want = (got, pullback(g_nd)[0]), (want, want_pullback(g_nd.astype(jnp.float32))[0])
        for half, single in zip(got, want, strict=True):
            assert half.dtype == jnp.bfloat16
            # The compiler may add up in another order, and so round to the neighbour.
            np.testing.assert_allclose(half.astype(jnp.float32), single, rtol=2**-8, atol=1e-6 * k)


# The interpreter of Pallas mixes varying and unvarying arrays, which check_vma refuses.
@several_devices
@pytest.mark.parametrize("implementation", implementations(set(TAKE) - {"triton_interpreted"}))
def test_gradients_inside_shard_map(implementation: str):
    slots_nk, source_r = ticket(6, 2, 14, 0.8)

    def loss(x, w, slots, source):
        rows = take_rows(x, slots, source, implementation=implementation)
        return jnp.sum(sum_rows(jnp.tanh(rows), w, slots, source, implementation=implementation) ** 2)

    def each(gradient):
        """Two shards with the same tickets and different rows."""
        return [jnp.concatenate([a, 2 * a]) for a in gradient]

    halves = PartitionSpec("data")
    mapped = jax.shard_map(
        jax.grad(loss, argnums=(0, 1)), mesh=Mesh(np.asarray(jax.devices()[:2]), ("data",)),
        in_specs=(halves, halves, PartitionSpec(), PartitionSpec()), out_specs=(halves, halves), check_vma=True,
    )  # fmt: skip
    x, w = draw(6, 5, seed=0), draw(6, 2, seed=1)
    got = jax.jit(mapped)(*each((x, w)), slots_nk, source_r)
    want = [jax.grad(loss, (0, 1))(scale * x, scale * w, slots_nk, source_r) for scale in (1, 2)]
    for number, array in enumerate(got):
        np.testing.assert_allclose(array, np.concatenate([gradient[number] for gradient in want]), rtol=1e-5, atol=1e-5)


def test_names_are_known():
    assert SUM.keys() == TAKE.keys()
    with pytest.raises(ValueError, match=r"implementation='sort': expected one of \['gather', 'triton', 'triton_int"):
        take_rows(jnp.zeros((2, 3)), jnp.zeros((2, 1), int), jnp.zeros(2, int), implementation="sort")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_triton_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
        take_rows(jnp.zeros((2, 3)), jnp.zeros((2, 1), int), jnp.zeros(2, int), implementation="triton")
