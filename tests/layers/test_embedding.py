"""Embedding, head and MLP over a split vocabulary and hidden width. Letters: b batch, t time, d model, v vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.embedding import Embedding, Head
from orogen.layers.mlp import MLP, squared_relu
from orogen.layers.parameter import parameter
from orogen.parallel.plan import make_plan

MODEL = ModelConfig(pattern="-", vocab_size=12, hidden_size=6, intermediate_size=10)
PLANS = {"1": {}, "2": {"tensor": 2}, "4 sharded": {"data": 2, "tensor": 2, "fsdp": "parameters"}}


@pytest.mark.parametrize("name", PLANS)
def test_embedding_reads_rows_and_gives_zeros_outside_the_vocabulary(name):
    plan = make_plan(PlanConfig(**PLANS[name]), MODEL)
    graph, state = nnx.split(Embedding(12, 6, std=1.0, rngs=nnx.Rngs(0)))
    tokens_bt = jnp.array([[0, 5, 6, 11], [12, -1, 11, 0]])
    run = plan.run(
        lambda state, tokens_bt: nnx.merge(graph, state)(tokens_bt, plan),
        inputs=(plan.specs(state), plan.spec("batch", "context")), outputs=plan.spec("batch", "tokens", None),
    )  # fmt: skip
    rows_vd = np.asarray(state["weight"][...])
    expected = [[rows_vd[0], rows_vd[5], rows_vd[6], rows_vd[11]], [0 * rows_vd[0]] * 2 + [rows_vd[11], rows_vd[0]]]
    np.testing.assert_array_equal(jax.jit(run)(state, tokens_bt), expected)


@pytest.mark.parametrize("name", PLANS)
def test_head_gives_whole_float32_logits(name):
    plan = make_plan(PlanConfig(**PLANS[name]), MODEL)
    graph, state = nnx.split(Head(6, 12, std=1.0, rngs=nnx.Rngs(0)))
    x_btd = jax.random.normal(jax.random.key(1), (2, 3, 6)).astype(jnp.bfloat16)
    state = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)

    def device(state, x_btd):
        logits_btv = nnx.merge(graph, state)(x_btd, plan)
        return logits_btv[..., None] if logits_btv.shape[-1] == 12 else None  # whole on every rank

    run = plan.run(
        device, inputs=(plan.specs(state), plan.spec("batch", None, None)),
        outputs=plan.spec("batch", None, None, "sequence"),
    )  # fmt: skip
    logits_btvr = jax.jit(run)(state, x_btd)
    assert logits_btvr.dtype == jnp.float32
    w_dv = np.asarray(state["weight"][...], np.float32)
    for rank in range(logits_btvr.shape[-1]):
        np.testing.assert_allclose(logits_btvr[..., rank], np.asarray(x_btd, np.float32) @ w_dv, rtol=1e-5, atol=1e-6)


def test_mlp_by_hand():
    mlp = MLP(2, 3, std=1.0, out_std=1.0, rngs=nnx.Rngs(0))
    mlp.up[...] = jnp.array([[1.0, 0, -1], [0, 2, 1]])
    mlp.down[...] = jnp.array([[1.0, 0], [0, 1], [5, 5]])
    # (3, 1) -> (3, 2, -2) -> (9, 4, 0)
    np.testing.assert_array_equal(mlp(jnp.array([[[3.0, 1.0]]]), make_plan(PlanConfig(), MODEL)), [[[9, 4]]])


def test_squared_relu_by_hand():
    np.testing.assert_array_equal(squared_relu(jnp.array([-3.0, 0.0, 0.5, 4.0])), [0, 0, 0.25, 16])


def test_parameter_needs_one_name_a_dimension():
    with pytest.raises(ValueError, match="one name a dimension"):
        parameter(jnp.ones((2, 3)), ("embed",))
