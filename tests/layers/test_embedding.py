"""Embedding and head over a split vocabulary, learned positions, one matrix for both.

Letters: b batch, t time, d model, v vocabulary, p positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.documents import Documents
from orogen.layers.embedding import Embedding, Head, logits
from orogen.layers.parameter import parameter
from orogen.model.lm import LanguageModel
from orogen.parallel.axes import STREAM
from orogen.parallel.plan import make_plan

MODEL = ModelConfig(pattern="-", vocab_size=12, hidden_size=6, intermediate_size=10)
PLANS = {"1": {}, "2": {"tensor": 2}, "4 sharded": {"data": 2, "tensor": 2, "fsdp": "parameters"}}


@pytest.mark.parametrize("name", PLANS)
def test_embedding_reads_rows_and_gives_zeros_outside_the_vocabulary(name):
    plan = make_plan(PlanConfig(**PLANS[name]), MODEL)
    graph, state = nnx.split(Embedding(MODEL, nnx.Rngs(0)))
    tokens_bt = jnp.array([[0, 5, 6, 11], [12, -1, 11, 0]])
    docs = Documents(jnp.ones_like(tokens_bt), jnp.zeros_like(tokens_bt))
    run = plan.run(
        lambda state, tokens_bt: nnx.merge(graph, state)(tokens_bt, docs, plan),
        inputs=(plan.specs(state), plan.spec("batch", "context")), outputs=plan.spec(*STREAM, None),
    )  # fmt: skip
    rows_vd = np.asarray(state["weight"][...])
    expected = [[rows_vd[0], rows_vd[5], rows_vd[6], rows_vd[11]], [0 * rows_vd[0]] * 2 + [rows_vd[11], rows_vd[0]]]
    np.testing.assert_array_equal(jax.jit(run)(state, tokens_bt), expected)


@pytest.mark.parametrize("name", PLANS)
def test_head_gives_whole_float32_logits(name):
    plan = make_plan(PlanConfig(**PLANS[name]), MODEL)
    graph, state = nnx.split(Head(MODEL, nnx.Rngs(0)))
    x_btd = jax.random.normal(jax.random.key(1), (2, 3, 6)).astype(jnp.bfloat16)
    state = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)

    def device(state, x_btd):
        logits_btv = logits(x_btd, plan.weight(nnx.merge(graph, state).weight), plan)
        return logits_btv[..., None] if logits_btv.shape[-1] == 12 else None  # whole on every rank

    run = plan.run(
        device, inputs=(plan.specs(state), plan.spec("batch", None, None)),
        outputs=plan.spec("batch", None, None, "tensor"),
    )  # fmt: skip
    logits_btvr = jax.jit(run)(state, x_btd)
    assert logits_btvr.dtype == jnp.float32
    w_dv = np.asarray(state["weight"][...], np.float32)
    for rank in range(logits_btvr.shape[-1]):
        np.testing.assert_allclose(logits_btvr[..., rank], np.asarray(x_btd, np.float32) @ w_dv, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_learned_positions_are_added_by_place_in_the_document(name):
    model = dataclasses.replace(MODEL, learned_positions=3)
    plan = make_plan(PlanConfig(**PLANS[name]), model)
    graph, state = nnx.split(Embedding(model, nnx.Rngs(0)))
    # Two documents and padding, whose position does not count; then one document that is a token too long.
    tokens_bt = jnp.array([[0, 5, 6, 11], [1, 2, 3, 4]])
    docs = Documents(jnp.array([[1, 1, 2, 0], [1, 1, 1, 1]]), jnp.array([[0, 1, 0, 9], [0, 1, 2, 3]]))
    split = plan.spec("batch", "context")
    run = plan.run(
        lambda state, tokens_bt, docs: nnx.merge(graph, state)(tokens_bt, docs, plan),
        inputs=(plan.specs(state), split, split), outputs=plan.spec(*STREAM, None),
    )  # fmt: skip
    x_btd = jax.jit(run)(state, tokens_bt, docs)
    rows_vd, rows_pd = (np.asarray(state[name][...]) for name in ("weight", "positions"))
    expected_btd = rows_vd[tokens_bt] + rows_pd[np.array([[0, 1, 0, 0], [0, 1, 2, 2]])]
    np.testing.assert_array_equal(x_btd[0], expected_btd[0])
    np.testing.assert_array_equal(x_btd[1, :3], expected_btd[1, :3])
    assert np.isnan(x_btd[1, 3]).all()


def test_a_deeper_prediction_sees_later_tokens_at_their_own_positions():
    model = dataclasses.replace(MODEL, pattern="-/-", mtp_depths=2, learned_positions=5)
    plan, built = make_plan(PlanConfig(), model), LanguageModel(model, nnx.Rngs(0))
    seen = []

    class Witness(Embedding):
        def __call__(self, tokens_bt, docs, plan):
            seen.append((tokens_bt, docs.positions_bt))
            return super().__call__(tokens_bt, docs, plan)

    built.embedding = Witness(model, nnx.Rngs(0))
    tokens_bt, positions_bt = jnp.array([[7, 8, 9, 3, 4]]), jnp.array([[0, 1, 2, 0, 1]])
    docs = Documents(jnp.array([[1, 1, 1, 2, 2]]), positions_bt)
    h_btd, _ = built.hidden(tokens_bt, docs, plan)
    built.deeper(h_btd, tokens_bt, docs, plan)
    for (tokens, positions), expected in zip(
        seen,
        [([7, 8, 9, 3, 4], [0, 1, 2, 0, 1]), ([8, 9, 3, 4, 0], [1, 2, 0, 1, 0]), ([9, 3, 4, 0, 0], [2, 0, 1, 0, 0])],
        strict=True,
    ):
        np.testing.assert_array_equal([tokens[0], positions[0]], expected)


def test_a_tied_head_is_the_embedding_and_both_uses_make_its_gradient():
    model = dataclasses.replace(MODEL, tie_word_embeddings=True)
    plan = make_plan(PlanConfig(), model)
    tokens_bt = jnp.array([[0, 5, 6, 11, 5]])
    docs = Documents(jnp.ones_like(tokens_bt), jnp.arange(5)[None])
    gy_btv = jax.random.normal(jax.random.key(1), (1, 5, 12))
    graph, state = nnx.split(LanguageModel(MODEL, nnx.Rngs(0)))
    tied_graph, tied_state = nnx.split(LanguageModel(model, nnx.Rngs(1)))
    rows_vd = state["embedding"]["weight"][...]

    def total(rows_vd, head_dv):
        filled = {("embedding", "weight"): rows_vd, ("head", "weight"): head_dv}
        where, whole = (tied_graph, tied_state) if head_dv is None else (graph, state)
        missing = dict(nnx.to_flat_state(state))
        flat = [(p, v.replace(filled.get(p, missing[p].get_value()))) for p, v in nnx.to_flat_state(whole)]
        return jnp.sum(nnx.merge(where, nnx.from_flat_state(flat)).logits(tokens_bt, docs, plan) * gy_btv)

    assert {p for p, _ in nnx.to_flat_state(state)} - {p for p, _ in nnx.to_flat_state(tied_state)} == {
        ("head", "weight")
    }
    grad_vd, grad_dv = jax.grad(total, argnums=(0, 1))(rows_vd, rows_vd.T)
    np.testing.assert_allclose(total(rows_vd, None), total(rows_vd, rows_vd.T), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(total)(rows_vd, None), grad_vd + grad_dv.T, rtol=1e-5, atol=1e-5)


def test_parameter_needs_one_name_a_dimension():
    with pytest.raises(ValueError, match="one name per dimension"):
        parameter(jnp.ones((2, 3)), ("embed",))
