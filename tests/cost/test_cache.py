"""What a layer's costs say it keeps of a request is what its mixer makes room for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.cost.test_weights import EVERY

from orogen.config.kinds import LAYERS
from orogen.cost.kind import Cached, request_cache
from orogen.model.block import Layer
from orogen.model.cache import KeyValues, Recurrent, Rows

LENGTH = 6


@pytest.mark.parametrize("letter", LAYERS)
def test_caches_have_the_numbers_that_the_costs_say(letter):
    started = jax.eval_shape(lambda: Layer(letter, EVERY, nnx.Rngs(0)).start(Rows(1, LENGTH), jnp.float32))
    size = lambda arrays: sum(int(np.prod(a.shape)) for a in arrays)  # noqa: E731
    cached, found = request_cache(letter, EVERY), Cached()
    if isinstance(started, KeyValues):
        found = Cached(token=size(started.values) // LENGTH, window=3 if letter == "w" else None)
    elif isinstance(started, Recurrent):
        channels = size([started.state]) // EVERY.ssm_state_size
        found = Cached(channels=channels, taps=size(started.windows))
    assert cached._replace(replayed=0, replayed_float32=0) == found
