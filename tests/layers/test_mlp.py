"""MLP and activations: by hand, and split over ranks. Letters: b batch, t time, d model, f hidden."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.mlp import ACTIVATIONS, MLP, activate, squared_relu
from orogen.parallel.axes import STREAM
from orogen.parallel.plan import make_plan


def config(size: int = 2, hidden: int = 3, **changes) -> ModelConfig:
    return ModelConfig(pattern="-", vocab_size=12, hidden_size=size, intermediate_size=hidden, **changes)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_mlp_by_hand():
    mlp = MLP(config(), 3, bias=False, rngs=nnx.Rngs(0))
    mlp.up[...] = jnp.array([[1.0, 0, -1], [0, 2, 1]])
    mlp.down[...] = jnp.array([[1.0, 0], [0, 1], [5, 5]])
    # (3, 1) -> (3, 2, -2) -> (9, 4, 0)
    np.testing.assert_array_equal(
        mlp.transform(jnp.array([[[3.0, 1.0]]]), make_plan(PlanConfig(), config())), [[[9, 4]]]
    )


def test_gated_mlp_with_biases_by_hand():
    model = config(mlp_gated=True, mlp_hidden_act="relu")
    mlp = MLP(model, 3, bias=True, rngs=nnx.Rngs(0))
    mlp.up[...], mlp.up_bias[...] = jnp.array([[1.0, 0, -1], [0, 2, 1]]), jnp.array([0.5, 0.0, 0.0])
    mlp.gate[...], mlp.gate_bias[...] = jnp.array([[1.0, 1, 1], [0, 0, -4]]), jnp.array([0.0, -2.0, 0.5])
    mlp.down[...], mlp.down_bias[...] = jnp.array([[1.0, 0], [0, 1], [5, 5]]), jnp.array([0.25, -7.0])
    # (3, 1): up (3.5, 2, -2); gate (3, 1, -0.5), of which relu leaves (3, 1, 0); hidden (10.5, 2, 0)
    np.testing.assert_array_equal(
        mlp.transform(jnp.array([[[3.0, 1.0]]]), make_plan(PlanConfig(), model)), [[[10.75, -5.0]]]
    )


def test_squared_relu_by_hand():
    np.testing.assert_array_equal(squared_relu(jnp.array([-3.0, 0.0, 0.5, 4.0])), [0, 0, 0.25, 16])


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu2", lambda x: max(x, 0) ** 2),
        ("relu", lambda x: max(x, 0)),
        ("silu", lambda x: x * sigmoid(x)),
        ("gelu", lambda x: x / 2 * (1 + math.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: x / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    ],
)
def test_activation_follows_its_formula(name, formula):
    # Further down than -2, 1 + tanh has lost its digits in float32.
    x = np.array([-2.0 if name == "gelu_tanh" else -3.0, -0.7, 0.0, 0.4, 2.5])
    np.testing.assert_allclose(activate(jnp.asarray(x), None, name=name), [formula(i) for i in x], rtol=2e-6, atol=1e-7)
    gated = activate(jnp.full(5, 2.0), jnp.asarray(x), name=name)
    np.testing.assert_allclose(gated, [2 * formula(i) for i in x], rtol=2e-6, atol=1e-7)


def test_every_activation_of_the_config_exists():
    from orogen.config import model

    assert tuple(ACTIVATIONS) == model.ACTIVATIONS


def test_clamped_swiglu_by_hand():
    # Limit 2. The gate is clamped from above only, up on both sides.
    gate, up = jnp.array([-5.0, 1.0, 3.0, 2.0, 0.5]), jnp.array([1.0, 3.0, -9.0, 2.0, -0.5])
    g, u = np.array([-5.0, 1.0, 2.0, 2.0, 0.5]), np.array([1.0, 2.0, -2.0, 2.0, -0.5])
    np.testing.assert_allclose(activate(up, gate, name="silu", limit=2.0), (u + 1) * g * sigmoid(1.702 * g), rtol=1e-6)


@pytest.mark.parametrize("plan", [{"tensor": 2}, {"data": 2, "tensor": 4, "fsdp": "parameters"}], ids=["2", "8"])
@pytest.mark.parametrize("gated", [False, True])
def test_split_mlp_equals_one_device(plan, gated):
    """Forward and every gradient, biases included: the down bias counts once however many ranks add up."""
    model = config(6, 8, mlp_bias=True, mlp_gated=gated, mlp_hidden_act="silu")
    graph, state = nnx.split(MLP(model, 8, bias=True, rngs=nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), 9))
    state = jax.tree.map(lambda w: jax.random.normal(next(keys), w.shape), state)
    x_btd, gy_btd = (jax.random.normal(next(keys), (2, 4, 6)) for _ in range(2))

    def on(plan):
        def device(state, x_btd, gy_btd):
            def total(state, x_btd):
                y_btd = nnx.merge(graph, state).transform(x_btd, plan)
                return plan.total(jnp.sum(y_btd * gy_btd)), y_btd

            (_, y_btd), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, x_btd)
            return y_btd, *grads

        tokens, specs = plan.spec(*STREAM, None), plan.specs(state)
        run = plan.run(device, inputs=(specs, tokens, tokens), outputs=(tokens, specs, tokens))
        return jax.tree.leaves(jax.jit(run)(state, x_btd, gy_btd))

    whole, split = (on(make_plan(PlanConfig(**sizes), model)) for sizes in ({}, plan))
    assert len(whole) == 2 + (6 if gated else 4)
    for a, b in zip(split, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
