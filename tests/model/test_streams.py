"""The residual stream after layers of a stack, repeated ones too, against layers applied one by one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.layers.documents import Documents
from orogen.model.block import Repeat, repeats
from orogen.model.lm import build, initial_state, written_out
from orogen.model.streams import streams, unwatched, watching
from orogen.parallel.plan import single_device_plan

PATTERN = "--*--*-E"  # (-- *) twice, in which - is twice; then two layers


def test_streams_of_repeated_layers_are_those_of_layers_one_by_one():
    config = hybrid(pattern=PATTERN, mtp_depths=0)
    assert isinstance(repeats(PATTERN)[0], Repeat) and isinstance(repeats(PATTERN)[0].items[0], Repeat)
    built, (params, buffers) = build(config), initial_state(config, 2)
    plan, rng = single_device_plan(PlanConfig(), config), np.random.default_rng(3)
    x_btd = jnp.asarray(rng.normal(size=(2, 7, config.hidden_size)), jnp.float32)
    segments_bt = jnp.asarray([[1] * 7, [1, 1, 1, 2, 2, 2, 0]], jnp.int32)
    docs = Documents(segments_bt, jnp.asarray([range(7), [0, 1, 2, 0, 1, 2, 0]], jnp.int32))
    watched = (7, 1, 3, 5, 5)

    def scanned(params, buffers):
        stack = nnx.merge(built.graph, params, buffers).backbone
        y_btd, kept = stack(x_btd, docs, plan, watching(PATTERN, watched))
        return y_btd, streams(PATTERN, kept, watched), unwatched(kept), stack(x_btd, docs, plan)[1]

    def one_by_one(apart, state):
        found, h_btd = [], x_btd
        for number, layer in enumerate(nnx.merge(apart.graph, *state).backbone.children):
            h_btd, _ = layer(h_btd, docs, plan.of_layers(number, number + 1).of_layer())
            found.append(h_btd)
        return found

    y_btd, found, kept, plain = jax.jit(scanned)(params, buffers)
    apart, state = written_out(config, built, params, buffers)
    expected = jax.jit(lambda state: one_by_one(apart, state))(state)
    for number, stream_btd in zip(watched, found, strict=True):
        np.testing.assert_allclose(stream_btd, expected[number], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(y_btd, expected[-1], rtol=2e-5, atol=2e-5)
    # What routers count is as without.
    assert jax.tree.structure(kept) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, kept, plain)
    assert watching(PATTERN, ()) is None
