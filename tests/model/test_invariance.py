"""What a token may depend on: its own document, up to itself. Letters: b batch, t time, s another time, d model."""

import dataclasses
import functools
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import several_devices
from tests.model.small import Witness, config, merged, one_device

from orogen.config.model import ModelConfig
from orogen.data.packing import Batch
from orogen.layers.documents import documents
from orogen.model.mtp import shifted_segments
from orogen.parallel.context import later
from orogen.train.loss import Counts, Sums, batch_counts, loss_share
from orogen.train.next_token import LOSS, MTP_LOSS, NEXT_TOKENS
from orogen.train.step import batch_to_devices

# A row of documents of 7, 1, 5 and 2 tokens and 2 of padding; one of 3 and 9, padding between them and at the end.
LENGTHS = ((7, 1, 5, 2, -2), (3, -1, 9, -4))
DEPTHS = 2
# Between them, every letter. Documents are longer than the window.
MODELS = {
    "hybrid": config(),
    "attention": config(
        pattern="w*E/wE", rope_theta=30.0, head_dim=8, partial_rotary_factor=0.5, qk_norm=True, attention_sinks=True,
        attention_bias="all", sliding_window=3,
    ),
    "latent attention": config(
        pattern="++E/+E", rope_theta=30.0, yarn_factor=4.0, yarn_original_positions=8, rope_interleave=True,
        q_lora_rank=8, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3, attention_bias="all",
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


class Answers(NamedTuple):
    """See `answers`."""

    hidden: list[jax.Array]
    nats_bt: jax.Array
    loss: jax.Array
    sums: Sums
    counts: Counts


def segments_of(lengths: tuple[int, ...]) -> np.ndarray:
    """Segment ids of one row; a negative length is padding."""
    return np.concatenate([np.full(abs(n), i if n > 0 else 0) for i, n in enumerate(lengths, 1)]).astype(np.int32)


SEGMENTS_BT = np.stack([segments_of(row) for row in LENGTHS])


def batch_of(tokens_bt: np.ndarray, segments_bt: np.ndarray) -> Batch:
    """Weights from 0.5 to 1.5 by token id, zero on first tokens and padding, so that a wrong weight shows."""
    first_bt = np.diff(segments_bt, axis=1, prepend=-1) != 0
    weights_bt = np.where(first_bt | (segments_bt == 0), 0, 0.5 + tokens_bt / 22).astype(np.float32)
    return Batch(tokens_bt, segments_bt, np.asarray(documents(segments_bt).positions_bt), weights_bt)


def random_tokens(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 23, SEGMENTS_BT.shape).astype(np.int32)


def apart(batch: Batch) -> tuple[Batch, list[tuple[int, np.ndarray]]]:
    """Each document in a row of its own, padded, and its (row, positions) in `batch`."""
    places = [(b, np.flatnonzero(s == i)) for b, s in enumerate(batch.segments_bt) for i in np.unique(s[s > 0])]
    shape = (len(places), batch.tokens_bt.shape[1])
    rows = batch.map(lambda x: np.zeros(shape, x.dtype))
    for row, (b, where) in enumerate(places):
        for new, old in zip(rows[:4], batch[:4], strict=True):
            new[row, : len(where)] = old[b, where]
        rows.segments_bt[row, : len(where)] = 1
    return rows, places


@partial(jax.jit, static_argnames="model_config")
def answers(batch: Batch, model_config: ModelConfig):
    """Hidden states of every depth, nats of the next token by position, the objective, its sums and its counts."""
    model, plan = Witness(merged(model_config)), one_device(model_config)
    counts = batch_counts(batch, NEXT_TOKENS, DEPTHS, plan)
    loss, sums = loss_share(model, batch, counts, objective=NEXT_TOKENS, config=model_config, plan=plan)
    likelihood_btv = jax.nn.log_softmax(model.project(model.seen[0], plan))
    nats_bt = -jnp.take_along_axis(likelihood_btv, later(batch.tokens_bt, 1, plan)[..., None], -1)[..., 0]
    return Answers(model.seen, nats_bt, loss, sums, counts)


def last_valid(segments_bt: np.ndarray, depth: int) -> np.ndarray:
    """Where a token `depth` further on is in the same document."""
    return np.asarray(shifted_segments(jnp.asarray(segments_bt), depth, one_device(config()))) != 0


PACKED = batch_of(random_tokens(0), SEGMENTS_BT)
# The same documents under ids that come back: a document of one token lies between two of id 1.
RETURNING = PACKED._replace(segments_bt=np.where(SEGMENTS_BT == 0, 0, 2 - SEGMENTS_BT % 2))


@every_model
def test_a_packed_row_has_the_hidden_states_of_its_documents_apart(model):
    rows, places = apart(PACKED)
    packed, alone = answers(PACKED, model), answers(rows, model)
    assert len(packed.hidden) == 1 + DEPTHS
    for row, (b, where) in enumerate(places):
        for depth in range(1 + DEPTHS):
            valid = last_valid(SEGMENTS_BT, depth)[b, where]
            found, expected = packed.hidden[depth][b, where], alone.hidden[depth][row, : len(where)]
            np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-5, atol=1e-5)
        found, expected = packed.nats_bt[b, where[:-1]], alone.nats_bt[row, : len(where) - 1]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@every_model
def test_a_packed_row_has_the_losses_of_its_documents_apart(model):
    packed, alone = answers(PACKED, model), answers(apart(PACKED)[0], model)
    for name in (LOSS, MTP_LOSS):
        np.testing.assert_allclose(packed.sums.metrics[name], alone.sums.metrics[name], rtol=1e-6)
        np.testing.assert_allclose(packed.counts.metrics[name], alone.counts.metrics[name], rtol=1e-6)
    np.testing.assert_array_equal(packed.counts.tokens, alone.counts.tokens)
    for load_e, load_alone_e in zip(packed.sums.load, alone.sums.load, strict=True):
        np.testing.assert_array_equal(load_e, load_alone_e)


@every_model
def test_an_id_that_comes_back_is_another_document(model):
    before, after = answers(PACKED, model), answers(RETURNING, model)
    for depth in range(1 + DEPTHS):
        valid = last_valid(SEGMENTS_BT, depth)
        np.testing.assert_array_equal(after.hidden[depth][valid], before.hidden[depth][valid])
        np.testing.assert_array_equal(last_valid(RETURNING.segments_bt, depth), valid)
    chex.assert_trees_all_equal(after[2:], before[2:])


@pytest.mark.parametrize("sizes", [{}, {"context": 4}, {"context": 2, "data": 2}])
@several_devices
def test_a_batch_is_numbered_before_ranks_get_their_parts(sizes):
    """So that what follows on the devices, losses and gradients, is the same program of the same numbers."""
    plan = one_device(MODELS["hybrid"], **sizes)
    long = lambda batch: batch.map(lambda x: np.tile(x, 8)[:, :16])  # noqa: E731
    found, expected = (batch_to_devices(long(batch), plan) for batch in (RETURNING, PACKED))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.segments_bt.dtype == np.int32


@every_model
def test_tokens_at_padding_change_nothing(model):
    tokens_bt = np.where(SEGMENTS_BT == 0, random_tokens(1), PACKED.tokens_bt)
    assert (tokens_bt != PACKED.tokens_bt).any()
    before, after = answers(PACKED, model), answers(PACKED._replace(tokens_bt=tokens_bt), model)
    for depth in range(1 + DEPTHS):
        valid = last_valid(SEGMENTS_BT, depth)
        np.testing.assert_array_equal(after.hidden[depth][valid], before.hidden[depth][valid])
    assert after.loss == before.loss
    for name in (LOSS, MTP_LOSS):
        np.testing.assert_array_equal(after.sums.metrics[name], before.sums.metrics[name])


@every_model
def test_batch_order_does_not_matter(model):
    before, after = answers(PACKED, model), answers(PACKED.map(lambda x: x[::-1].copy()), model)
    for a, b in zip(after.hidden, before.hidden, strict=True):
        np.testing.assert_allclose(a[::-1], b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.loss, before.loss, rtol=1e-6)
    for name in (LOSS, MTP_LOSS):
        np.testing.assert_allclose(after.sums.metrics[name], before.sums.metrics[name], rtol=1e-6)


@functools.cache
def dependencies(model_config: ModelConfig) -> np.ndarray:
    """(depth, b · t, b · s): whether a hidden state has a gradient with respect to the embedding of another token.

    Every token is another one, so row s of the embedding is the input of position s alone.
    """
    model_config = dataclasses.replace(model_config, vocab_size=SEGMENTS_BT.size)
    plan = one_device(model_config)
    tokens_bt = np.arange(SEGMENTS_BT.size, dtype=np.int32).reshape(SEGMENTS_BT.shape)
    direction_d = jax.random.normal(jax.random.key(0), (12,))

    def projected(table_vd):
        model = merged(model_config, embedding_vd=table_vd)
        h_btd, _ = model.hidden(tokens_bt, documents(SEGMENTS_BT), plan)
        hidden = [h_btd] + [h for h, _ in model.deeper(h_btd, tokens_bt, documents(SEGMENTS_BT), plan)]
        return jnp.stack([h.reshape(-1, 12) @ direction_d for h in hidden])

    table_vd = jax.random.normal(jax.random.key(1), (SEGMENTS_BT.size, 12))
    jacobian = jax.jit(jax.jacrev(projected))(table_vd)
    return np.asarray(jnp.any(jacobian != 0, -1))


@every_model
@pytest.mark.parametrize("depth", range(1 + DEPTHS))
def test_a_hidden_state_depends_on_its_document_up_to_its_depth(model, depth):
    segments_n = SEGMENTS_BT.reshape(-1)
    row_n, time_n = np.divmod(np.arange(segments_n.size), SEGMENTS_BT.shape[1])
    same = (row_n[:, None] == row_n) & (segments_n[:, None] == segments_n)
    expected = same & (time_n[None, :] <= time_n[:, None] + depth)
    valid = last_valid(SEGMENTS_BT, depth).reshape(-1)
    assert 4 < valid.sum() < segments_n.size
    np.testing.assert_array_equal(dependencies(model)[depth][valid], expected[valid])
