"""A row computed in pieces that follow one another, through caches, equals the row at once."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import several_devices
from tests.model.small import config, one_device, randomised, relative_error

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.documents import Documents, documents
from orogen.layers.embedding import Embedding
from orogen.model.block import Stack, repeats
from orogen.model.cache import EMPTY, KeyValues, Rows, caches
from orogen.parallel.axes import STREAM
from orogen.parallel.plan import Plan, make_plan

TIME, DTYPE = 12, jnp.float32
# A document from the first token to the last; three of them, of which two go over edges of pieces; padding between
# documents and after them, and a document of one token.
SEGMENTS = np.array([[1] * 12, [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3], [1, 1, 1, 1, 1, 0, 0, 2, 3, 3, 0, 0]], np.int32)
ROTARY: dict[str, Any] = {"rope_theta": 100.0}
LATENT = {
    "q_lora_rank": 6, "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5,
}  # fmt: skip
# Each letter once, with what families add to it, and a repetition, which is scanned.
PATTERNS: dict[str, dict[str, Any]] = {
    "Mw": {"sliding_window": 3, "attention_sinks": True},
    "m+": ROTARY | LATENT,
    "*-E": ROTARY | {"qk_norm": True, "head_dim": 6},
    "M*M*": {},
}
PIECES = (1, 4, 7)


def model_of(pattern: str) -> ModelConfig:
    return config(pattern=pattern, mtp_depths=0, **PATTERNS[pattern])


def stack_of(model: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    graph, state = nnx.split(jax.eval_shape(lambda: Stack(repeats(model.pattern), model, nnx.Rngs(0))))
    return graph, jax.tree.map(jnp.asarray, randomised(state, np.random.default_rng(0)))


def in_pieces(stack: Stack, x_btd, docs: Documents, plan: Plan):
    """The outputs of the pieces one after another, as one array."""
    found, given = [], stack.start(Rows(len(x_btd), docs.segments_bt.shape[1]), x_btd.dtype)
    for start, end in itertools.pairwise((0, *itertools.accumulate(PIECES))):
        y_btd, kept = stack(x_btd[:, start:end], Documents(*(a[:, start:end] for a in docs)), plan, given)
        found.append(y_btd)
        given = caches(kept)
    return jnp.concatenate(found, axis=1)


def token_by_token(stack: Stack, x_btd, docs: Documents, plan: Plan):
    """The same in a loop over single tokens."""

    def step(given, token):
        x_bd, *ids = token
        y_btd, kept = stack(x_bd[:, None], Documents(*(i[:, None] for i in ids)), plan, given)
        return caches(kept), y_btd[:, 0]

    tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x_btd, *docs))
    # On a mesh what is kept varies over all of it.
    empty = plan.vary(stack.start(Rows(len(docs.segments_bt), TIME), x_btd.dtype))
    _, y_tbd = jax.lax.scan(step, empty, tokens)
    return jnp.moveaxis(y_tbd, 0, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_of_a_row_equal_the_row(pattern):
    """Outputs and every gradient, of rows with several documents and padding."""
    model = model_of(pattern)
    (graph, state), docs, plan = stack_of(model), documents(SEGMENTS), one_device(model)
    rng = np.random.default_rng(1)
    x_btd, weight_btd = (rng.normal(size=(*SEGMENTS.shape, model.hidden_size)).astype(np.float32) for _ in range(2))
    weight_btd *= (SEGMENTS != 0)[..., None]

    def on(run):
        def total(state, x_btd):
            y_btd = run(nnx.merge(graph, state), x_btd, docs, plan)
            return jnp.sum(y_btd * weight_btd), y_btd * (SEGMENTS != 0)[..., None]

        grads, y_btd = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(state, x_btd)
        return y_btd, grads

    expected = on(lambda stack, *inputs: stack(*inputs)[0])
    for way in (in_pieces, token_by_token):
        assert relative_error(on(way), expected) < 3e-6


def test_rows_of_different_ages_go_on_together():
    """Two rows of 3 and 7 tokens, each computed alone, then 5 more tokens of both at once."""
    model = model_of("Mw")
    (graph, state), docs, plan, ages = stack_of(model), documents(SEGMENTS[:2]), one_device(model), (3, 7)
    x_btd = jnp.asarray(np.random.default_rng(2).normal(size=(2, TIME, model.hidden_size)), jnp.float32)

    def piece(row: int, start: int, end: int):
        return jax.tree.map(lambda a: a[row : row + 1, start:end], (x_btd, docs))

    def joined(*rows):
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)

    @jax.jit
    def run(state):
        stack = nnx.merge(graph, state)
        alone = [stack(*piece(row, 0, age), plan, stack.start(Rows(1, TIME), DTYPE))[1] for row, age in enumerate(ages)]
        later = joined(*(piece(row, age, age + 5) for row, age in enumerate(ages)))
        return stack(x_btd, docs, plan)[0], stack(*later, plan, joined(*(caches(kept) for kept in alone)))[0]

    whole_btd, y_btd = run(state)
    for row, age in enumerate(ages):
        np.testing.assert_allclose(y_btd[row], whole_btd[row, age : age + 5], rtol=1e-5, atol=1e-5)


@several_devices
def test_pieces_on_a_mesh_equal_the_row_on_one_device():
    """Caches of a device's own rows, heads and channels; fewer groups and key heads than ranks."""
    model = dataclasses.replace(model_of("Mw"), n_groups=1, num_key_value_heads=1)
    graph, state = stack_of(model)
    plan = make_plan(PlanConfig(data=2, tensor=2), model)
    segments_bt = SEGMENTS[[0, 1, 2, 1]]
    x_btd = jnp.asarray(np.random.default_rng(3).normal(size=(*segments_bt.shape, model.hidden_size)), jnp.float32)
    alone = one_device(model)
    expected_btd = jax.jit(lambda state: nnx.merge(graph, state)(x_btd, documents(segments_bt), alone)[0])(state)

    def device(state, *pieces):
        stack = nnx.merge(graph, state)
        given, found = stack.start(Rows(2, TIME), DTYPE), []
        for x_btd, docs in pieces:
            y_btd, kept = stack(x_btd, docs, plan, given)
            found.append(y_btd)
            given = caches(kept)
        return found

    spans = [slice(0, 4), slice(4, 6), slice(6, 12)]
    pieces = [jax.tree.map(lambda a, span=span: a[:, span], (x_btd, documents(segments_bt))) for span in spans]
    tokens, ids = plan.spec(*STREAM, None), plan.spec("batch", "context")
    inputs = (plan.specs(state), *[(tokens, Documents(ids, ids))] * len(spans))
    found = jax.jit(plan.run(device, inputs=inputs, outputs=[tokens] * len(spans)))(state, *pieces)
    valid = segments_bt != 0
    np.testing.assert_allclose(jnp.concatenate(found, 1)[valid], expected_btd[valid], rtol=1e-5, atol=1e-5)


@several_devices
@pytest.mark.parametrize("pattern", ["Mw", "m+", "*-E"])
def test_single_tokens_whose_rows_are_split_equal_the_rows_on_one_device(pattern):
    """What decoding does where `tensor` divides the rows and cannot divide a token: outputs and every gradient."""
    model = model_of(pattern)
    graph, state = stack_of(model)
    plan = make_plan(PlanConfig(tensor=2), model).decoding()
    segments_bt = SEGMENTS[[0, 1, 2, 1]]
    docs, rng = documents(segments_bt), np.random.default_rng(4)
    x_btd, weight_btd = (rng.normal(size=(*segments_bt.shape, model.hidden_size)).astype(np.float32) for _ in range(2))
    weight_btd *= (segments_bt != 0)[..., None]

    def on(plan: Plan, run):
        def device(state, x_btd, weight_btd, docs):
            def total(state, x_btd):
                y_btd = run(nnx.merge(graph, state), x_btd, docs, plan)
                return plan.total(jnp.sum(y_btd * weight_btd)), y_btd * (weight_btd != 0)

            grads, y_btd = jax.grad(total, argnums=(0, 1), has_aux=True)(state, x_btd)
            return y_btd, *grads

        stream, specs, ids = plan.spec(*STREAM, None), plan.specs(state), plan.spec("batch", "context")
        step = plan.run(
            device, inputs=(specs, stream, stream, Documents(ids, ids)), outputs=(stream, specs, stream)
        )  # fmt: skip
        return jax.device_get(jax.jit(step)(state, x_btd, weight_btd, docs))

    expected = on(one_device(model), lambda stack, *inputs: stack(*inputs)[0])
    assert relative_error(on(plan, token_by_token), expected) < 3e-6


@several_devices
def test_rows_and_tokens_that_tensor_does_not_divide_are_refused():
    """Of three rows, and of a single token, which is for `Plan.decoding`."""
    model = dataclasses.replace(model_of("Mw"), vocab_size=24)
    graph, state = nnx.split(jax.eval_shape(lambda: Embedding(model, nnx.Rngs(0))))
    plan = make_plan(PlanConfig(tensor=2), model)

    def embed(plan: Plan, *shape: int):
        tokens_bt = jnp.zeros(shape, jnp.int32)
        device = lambda state, ids: nnx.merge(graph, state)(ids, Documents(ids, ids), plan)  # noqa: E731
        inputs, outputs = (plan.specs(state), plan.spec("batch", "context")), plan.spec(*STREAM, None)
        return jax.eval_shape(plan.run(device, inputs=inputs, outputs=outputs), state, tokens_bt)

    assert embed(plan.decoding(), 4, 1).shape == (4, 1, model.hidden_size)
    for refused, shape, dim in ((plan.decoding(), (3, 1), 0), (plan, (4, 1), 1)):
        expected = rf"tensor=2 for \({shape[0]}, {shape[1]}, 12\): expected a multiple of 2 along dimension {dim}"
        with pytest.raises(ValueError, match=expected):
            embed(refused, *shape)


def test_refusals():
    model = model_of("Mw")
    (graph, state), docs = stack_of(model), documents(SEGMENTS)
    x_btd = jnp.zeros((*SEGMENTS.shape, model.hidden_size))

    def run(plan: Plan, slots: int):
        def piece(state):
            stack = nnx.merge(graph, state)
            return stack(x_btd, docs, plan, stack.start(Rows(len(x_btd), slots), DTYPE))[0]

        return jax.eval_shape(piece, state)

    with pytest.raises(ValueError, match="context=2 with caches of earlier tokens: expected context=1"):
        run(make_plan(PlanConfig(context=2), model), TIME)
    with pytest.raises(ValueError, match="a piece of 12 tokens for a cache of 11: expected at most 11"):
        run(one_device(model), TIME - 1)


def test_tokens_behind_the_last_slot_are_dropped_and_earlier_ones_stay():
    """In rows of different ages."""
    cache = KeyValues.empty(2, 3, [(1,)], jnp.float32)._replace(length_b=jnp.array([0, 1], jnp.int32))
    for first in (1, 3):
        values_bt1 = jnp.array([[first, first + 1]] * 2, jnp.float32)[..., None]
        docs = Documents(jnp.full((2, 2), first, jnp.int32), jnp.zeros((2, 2), jnp.int32))
        cache = cache.with_piece([values_bt1], docs)
    np.testing.assert_array_equal(cache.values[0][..., 0], [[1, 2, 3], [0, 1, 2]])
    np.testing.assert_array_equal(cache.segments_bs, [[1, 1, 3], [EMPTY, 1, 1]])
    np.testing.assert_array_equal(cache.length_b, [4, 5])
