"""Arrays of rows, packed by the host and unpacked on the devices."""

from typing import Any, NamedTuple

import jax
import numpy as np

from orogen.infer.knobs import Features, knobs_of
from orogen.infer.packing import pack, unpack
from orogen.infer.request import Request, Sampling


class Small(NamedTuple):
    """Arrays of every kind."""

    ids: Any
    flags: Any
    none: Any
    numbers: Any


def test_every_bit_comes_back():
    """Signs, NaN, infinities and arrays without columns, of three rows; the shapes of others say what there is."""
    numbers_b2 = np.array([[-0.0, np.nan], [np.inf, -np.inf], [1e-45, 3e38]], np.float32)
    ids_b = np.array([2**31, 7, 2**32 - 1], np.uint32)
    made = Small(ids_b, np.array([True, False, True]), np.zeros((3, 0), np.int32), numbers_b2)
    packed_bw = pack(made)
    assert packed_bw.shape == (3, 4) and packed_bw.dtype == np.int32
    like = Small(*(np.zeros((1, *a.shape[1:]), a.dtype) for a in made))
    found = jax.jit(lambda words: unpack(words, like))(packed_bw)
    for a, b in zip(made, found, strict=True):
        assert (b.shape, b.dtype) == (a.shape, a.dtype)
        assert np.asarray(b).tobytes() == a.tobytes()


def test_settings_come_back():
    features = Features(draws=True, biases=True, holds=True)
    sampling = Sampling(temperature=0.3, top_k=5, top_p=0.7, seed=2**62 + 5, logit_bias=((3, -1.5),))
    requests = [None, Request(prompt=(1,), max_tokens=9, min_tokens=2, held=(4, 8), sampling=sampling)]
    knobs, like = knobs_of(requests, features), knobs_of([None], features)
    for a, b in zip(knobs, unpack(pack(knobs), like), strict=True):
        np.testing.assert_array_equal(a, b)
