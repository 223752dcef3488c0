"""A model with every layer separate has the weights of the one it was made of, once."""

import jax
import numpy as np
from tests.infer.engines import opened

from orogen.model.lm import written_out


def test_weights_that_are_released_are_the_same_and_held_once():
    """Two layers of each kind that repeat, in stacks, and one of another kind."""
    model = opened("MEME*")
    stacked = [a for a in jax.tree.leaves(model.params["backbone"]["children"][0]) if a.ndim]
    assert {a.shape[0] for a in stacked} == {2}
    states = model.params, model.buffers
    built, expected = written_out(model.config, model.built, *states)
    assert not any(a.is_deleted() for a in stacked)
    expected = jax.tree.map(np.array, expected)
    before = {id(a) for a in jax.live_arrays()}
    again, found = written_out(model.config, model.built, *states, release=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), again.params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), built.params
    )
    assert all(a.is_deleted() for a in stacked)
    live = sum(a.nbytes for a in jax.live_arrays() if id(a) not in before and not a.is_deleted())
    assert live <= sum(a.nbytes for a in jax.tree.leaves(found)), "no copy beside them"
