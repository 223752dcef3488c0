"""Whether a target is the most likely token, with ties, padding and the vocabulary over ranks; numpy in float64.

Axes: n tokens, d model, v vocabulary.
"""

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tests.helpers import several_devices

from orogen.kernels.cross_entropy import judge

TOKENS, WIDTH, VOCABULARY, PADDED = 13, 5, 10, 12


def operands():
    """x, a head whose columns 3 and 8 are equal and whose padding is larger than all, and targets: the likeliest token
    of most, the second of two that are equally likely, and others."""
    rng = np.random.default_rng(4)  # small integers: products are exact, so that equal columns have equal logits
    x_nd, head_dv = rng.integers(-3, 4, (TOKENS, WIDTH)), rng.integers(-3, 4, (WIDTH, PADDED))
    head_dv[:, 3] = head_dv[:, 8] = 5
    x_nd[1] = x_nd[2] = 2
    logits_nv = (x_nd @ head_dv[:, :VOCABULARY]).astype(np.float64)
    head_dv[:, VOCABULARY:] = 40 * x_nd[3:5].T
    targets_n = logits_nv.argmax(1)
    assert targets_n[1] == 3
    targets_n[2], targets_n[5:8] = 8, (targets_n[5:8] + 1) % VOCABULARY
    likelihood_nv = logits_nv - np.log(np.exp(logits_nv).sum(1, keepdims=True))
    greedy_n = np.ones(TOKENS, bool)
    greedy_n[[2, 5, 6, 7]] = False
    wanted = likelihood_nv[np.arange(TOKENS), targets_n], greedy_n
    return (x_nd.astype(np.float32), head_dv.astype(np.float32), targets_n.astype(np.int32)), wanted


def check(found, wanted) -> None:
    np.testing.assert_allclose(found.log_likelihood, wanted[0], rtol=1e-5, atol=1e-5)
    assert found.greedy.tolist() == wanted[1].tolist()


@pytest.mark.parametrize("chunk", [1, 4, TOKENS, 100])
def test_targets_are_judged_in_chunks(chunk):
    arrays, wanted = operands()
    check(judge(*arrays, chunk=chunk, vocab_size=VOCABULARY), wanted)


@several_devices
def test_the_vocabulary_may_lie_on_several_ranks():
    """Four ranks of three columns: equal ones lie on two ranks, and the last rank has one that is no padding."""
    arrays, wanted = operands()

    def shard(x_nd, head_dv, targets_n):
        start = lax.axis_index("v") * head_dv.shape[1]
        reduce = {"reduce_max": lambda x: lax.pmax(x, "v"), "reduce_sum": lambda x: lax.psum(x, "v")}
        return judge(x_nd, head_dv, targets_n, chunk=5, vocab_start=start, vocab_size=VOCABULARY, **reduce)

    mesh = Mesh(np.array(jax.devices()[:4]), ("v",))
    specs = {"in_specs": (P(), P(None, "v"), P()), "out_specs": P()}
    check(jax.jit(jax.shard_map(shard, mesh=mesh, **specs))(*arrays), wanted)
