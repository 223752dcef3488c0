"""The objective: shifts, weights, counts and its terms, by hand. Letters: b batch, t time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.model.small import config, merged, one_device

from orogen.data.packing import Batch
from orogen.layers.documents import documents
from orogen.model.mtp import shifted_segments
from orogen.moe.layer import MoEStats
from orogen.parallel.context import later
from orogen.train.loss import batch_counts, loss_share
from orogen.train.next_token import LOSS, MTP_LOSS, NEXT_TOKENS, target_weights

# Documents of three and two tokens, and one token of padding. The weights of first tokens must not matter.
SEGMENTS_BT = jnp.array([[1, 1, 1, 2, 2, 0]])
WEIGHTS_BT = jnp.array([[9.0, 1.0, 0.5, 9.0, 2.0, 9.0]])
BATCH = Batch(jnp.array([[3, 1, 4, 1, 5, 9]]), SEGMENTS_BT, jnp.array([[0, 1, 2, 0, 1, 0]]), WEIGHTS_BT)
PLAN = one_device(config())


def test_later_by_hand():
    x_bt = jnp.array([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(later(x_bt, 0, PLAN), x_bt)
    np.testing.assert_array_equal(later(x_bt, 1, PLAN), [[2, 3, 0], [5, 6, 0]])
    np.testing.assert_array_equal(later(x_bt, 2, PLAN), [[3, 0, 0], [6, 0, 0]])


@pytest.mark.parametrize("steps", [3, 4])
def test_shift_past_the_end_leaves_zeros(steps):
    np.testing.assert_array_equal(later(jnp.ones((2, 3)), steps, PLAN), np.zeros((2, 3)))


def test_shifted_segments_by_hand():
    np.testing.assert_array_equal(shifted_segments(SEGMENTS_BT, 0, PLAN), SEGMENTS_BT)
    np.testing.assert_array_equal(shifted_segments(SEGMENTS_BT, 1, PLAN), [[1, 1, 0, 2, 0, 0]])
    np.testing.assert_array_equal(shifted_segments(SEGMENTS_BT, 2, PLAN), [[1, 0, 0, 0, 0, 0]])


def test_target_weights_stop_at_document_boundaries():
    np.testing.assert_array_equal(target_weights(BATCH, 0, PLAN), [[1, 0.5, 0, 2, 0, 0]])
    np.testing.assert_array_equal(target_weights(BATCH, 1, PLAN), [[0.5, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(target_weights(BATCH, 2, PLAN), [[0, 0, 0, 0, 0, 0]])


def test_counts_by_hand():
    two_rows = BATCH.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)]))  # the second row is all padding
    counts = batch_counts(two_rows, NEXT_TOKENS, 2, one_device(config()))
    assert counts.metrics[LOSS] == 3.5
    np.testing.assert_array_equal(counts.metrics[MTP_LOSS], [0.5, 0])
    np.testing.assert_array_equal(counts.tokens, [5, 3, 1])
    np.testing.assert_array_equal(counts.rows, [1, 1, 1])


def test_objective_is_the_sum_of_its_terms():
    # Sequences of odd length: packed with padding, one document, only padding, and documents too short for depth 2.
    model_config = config(pattern="-E/E")
    plan = one_device(model_config)
    rng = np.random.default_rng(0)
    tokens_bt = rng.integers(0, 23, (4, 11)).astype(np.int32)
    short = [1, 1, 2, 2, *[0] * 7]
    segments_bt = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11, [0] * 11, short], np.int32)
    batch = Batch(tokens_bt, segments_bt, np.zeros_like(tokens_bt), rng.random((4, 11), np.float32))
    counts = batch_counts(batch, NEXT_TOKENS, 2, plan)

    @jax.jit
    def run(batch):
        model = merged(model_config)
        found = loss_share(model, batch, counts, objective=NEXT_TOKENS, config=model_config, plan=plan)
        h_btd, stats = model.hidden(batch.tokens_bt, documents(batch.segments_bt), plan)
        deeper = model.deeper(h_btd, batch.tokens_bt, documents(batch.segments_bt), plan)
        likelihoods = [jax.nn.log_softmax(model.project(h, plan)) for h in [h_btd, *(h for h, _ in deeper)]]
        layers = jax.tree.leaves((stats, *(s for _, s in deeper)), is_leaf=lambda x: isinstance(x, MoEStats))
        return found, likelihoods, layers

    (loss, sums), likelihoods, layers = run(batch)
    nats_by_hand = np.zeros(3)
    for depth, likelihood_btv in enumerate(likelihoods):
        for b, t in np.ndindex(4, 11 - 1 - depth):
            target = t + 1 + depth
            if segments_bt[b, t] and segments_bt[b, t] == segments_bt[b, target]:
                nats_by_hand[depth] -= batch.weights_bt[b, target] * likelihood_btv[b, t, tokens_bt[b, target]]
    np.testing.assert_allclose(sums.metrics[LOSS], nats_by_hand[0], rtol=1e-6)
    np.testing.assert_allclose(sums.metrics[MTP_LOSS], nats_by_hand[1:], rtol=1e-6)
    # 24 tokens in 5 documents, each of which loses `depth` tokens. Row 3 counts nowhere, row 4 not at depth 2.
    np.testing.assert_array_equal(counts.tokens, [24, 19, 14])
    np.testing.assert_array_equal(counts.rows, [3, 3, 2])
    shares = nats_by_hand / [counts.metrics[LOSS], *counts.metrics[MTP_LOSS]]
    expected = shares[0] + 0.4 / 2 * (shares[1] + shares[2])
    for layer, (tokens, rows, applications) in zip(layers, [(24, 3, 1), (19, 3, 2), (14, 2, 2)], strict=True):
        expected += 0.02 * layer.losses.balance / rows / applications + 0.003 * layer.losses.z / tokens / applications
        assert layer.load.sum() == 3 * tokens
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(sums.load[0], layers[0].load)
    np.testing.assert_array_equal(sums.load[1], layers[1].load + layers[2].load)


def test_a_batch_of_padding_has_zero_loss_and_finite_gradients():
    model_config = config(pattern="M*/E", mtp_depths=1)
    plan = one_device(model_config)
    zeros_bt = jnp.zeros((2, 5), jnp.int32)
    batch = Batch(zeros_bt, zeros_bt, zeros_bt, zeros_bt.astype(jnp.float32))

    def loss(table_vd):
        model = merged(model_config, embedding_vd=table_vd)
        counts = batch_counts(batch, NEXT_TOKENS, 1, plan)
        return loss_share(model, batch, counts, objective=NEXT_TOKENS, config=model_config, plan=plan)[0]

    value, grad_vd = jax.jit(jax.value_and_grad(loss))(jnp.ones((23, 12)))
    assert value == 0
    np.testing.assert_array_equal(grad_vd, 0)
