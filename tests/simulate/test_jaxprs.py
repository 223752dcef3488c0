"""Matrix products of traced programs, worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from orogen.simulate.jaxprs import product_flops


def of(function, *shapes) -> int:
    return product_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_a_product_and_a_batch_of_them():
    assert of(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert of(jnp.matmul, (11, 3, 5), (11, 5, 7)) == 11 * 2 * 3 * 5 * 7


def test_a_scan_counts_each_turn():
    def loop(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, None, length=4)[0]

    assert of(loop, (3, 5), (5, 5)) == 4 * 2 * 3 * 5 * 5


def test_of_a_choice_the_heaviest_branch_counts():
    def choose(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert of(choose, (3, 5), (5, 5)) == 2 * 2 * 3 * 5 * 5


def test_rows_of_groups_meet_one_matrix_each():
    def grouped(x, w):
        return lax.ragged_dot(x, w, jnp.asarray([4, 7], jnp.int32))

    gradient = jax.grad(lambda x, w: grouped(x, w).sum(), argnums=(0, 1))
    one = 2 * 11 * 3 * 5
    assert of(grouped, (11, 3), (2, 3, 5)) == one
    assert of(gradient, (11, 3), (2, 3, 5)) in (2 * one, 3 * one)  # the forward product may be eliminated


def test_a_loop_of_unknown_length_is_refused():
    def loop(x, w):
        return lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)

    with pytest.raises(ValueError, match="a while loop"):
        of(loop, (3, 5), (5, 5))
