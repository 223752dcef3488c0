"""Schedules by hand; which parameters are decayed, and which Muon updates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tests.helpers import hybrid

from orogen.config.model import ModelConfig
from orogen.config.run import OptimizerConfig
from orogen.model.lm import build, initial_state
from orogen.train.optimizer import is_matrix, learning_rate, make_optimizer


def test_cosine_by_hand():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=4, min_ratio=0.1), steps=12)
    np.testing.assert_allclose(
        [rate(i) for i in (0, 1, 3, 4, 8, 12)], [0.5, 1.0, 2.0, 2.0, 0.2 + 1.8 / 2, 0.2], rtol=1e-6
    )


def test_wsd_holds_the_peak_then_falls_by_one_minus_the_root_of_progress():
    config = OptimizerConfig(learning_rate=2.0, schedule="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.5)
    rate = learning_rate(config, steps=10)
    expected = [1, 2, 2, 2, 2, 1 + (1 - 0.25**0.5), 1 + (1 - 0.5**0.5), 1.0]
    np.testing.assert_allclose([rate(i) for i in (0, 1, 2, 5, 6, 7, 8, 10)], expected, rtol=1e-6)


def test_constant_stays():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, schedule="constant"), steps=10)
    assert rate(0) == rate(9) == 2.0


# Every kind of layer, all of them stacked.
MODEL = hybrid(pattern="E*-ME*-M", mtp_depths=0)


@functools.cache
def parameters() -> nnx.State:
    return jax.jit(lambda: initial_state(MODEL, 0)[0])()


def full(value: float, tree: nnx.State) -> nnx.State:
    """Arrays like those of the tree, filled with `value` on the host: jax would compile a program for each."""
    return jax.tree.map(lambda p: np.full(p.shape, value, np.float32), tree)


@functools.cache
def first_update(config: OptimizerConfig, model: ModelConfig, without: str = ""):
    """A function (gradients, parameters) -> the first update and the optimizer's state after it; compiled without some
    of XLA's passes."""
    tx = make_optimizer(config, 10, build(model).params)
    # Two programs, so that XLA does not know that the moments are zero.
    start = jax.jit(tx.init)
    update = jax.jit(
        lambda grads, state, params: tx.update(grads, state, params, grad_norm=optax.tree.norm(grads)),
        compiler_options={"xla_disable_hlo_passes": without} if without else None,
    )
    return lambda grads, params: update(grads, start(params), params)


def apply(config: OptimizerConfig, grads: nnx.State):
    """The first update of the model's parameters from `grads` and the optimizer's state after it."""
    return first_update(config, MODEL)(grads, parameters())


def update(config: OptimizerConfig, *, gradient: float):
    """The update of each parameter by its path, when all gradients are `gradient`."""
    params = parameters()
    updates, _ = apply(config, full(gradient, params))
    flat = jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda x: isinstance(x, nnx.Variable))
    values = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [
        (leaf.get_metadata()["axes"], np.asarray(leaf[...]), np.asarray(v[...]))
        for (_, leaf), v in zip(flat, values, strict=True)
    ]


def test_decay_spares_vectors_even_when_layers_are_stacked():
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", weight_decay=0.1)
    for axes, change, value in update(config, gradient=0.0):
        expected = np.zeros_like(value) if len(axes) == 1 else -0.1 * value
        np.testing.assert_allclose(change, expected, rtol=1e-6, atol=1e-9, err_msg=str(axes))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_rates_of_mamba1_are_a_vector_to_decay_and_to_muon(name):
    model = hybrid(pattern="mm", mtp_depths=0, mamba_intermediate_size=72, time_step_rank=3)
    params = jax.jit(lambda: initial_state(model, 0)[0])()
    config = OptimizerConfig(name=name, learning_rate=1.0, schedule="constant", weight_decay=0.1, clip_norm=1e9)

    def updates(gradient: float) -> dict:
        found, _ = first_update(config, model)(full(gradient, params), params)
        return {path[-1]: np.asarray(v[...]) for path, v in nnx.to_flat_state(found)}

    decayed = updates(0.0)
    assert decayed["A_log"].shape == (2, 72, 5)
    np.testing.assert_array_equal(decayed["A_log"], 0)
    np.testing.assert_array_equal(decayed["D"], 0)
    assert (decayed["B"] != 0).all()
    np.testing.assert_allclose(updates(1.0)["A_log"], -1, rtol=1e-5)  # AdamW's first step; Muon's has another size


def test_biases_of_experts_are_vectors_to_decay_and_positions_are_not():
    model = hybrid(pattern="E", mtp_depths=0, mlp_bias=True, mlp_gated=True, learned_positions=7)
    params = build(model).params
    config = OptimizerConfig(learning_rate=1.0, schedule="constant", weight_decay=0.1)
    updates, _ = first_update(config, model)(full(0.0, params), full(1.0, params))
    spared = {"bias", "up_bias", "gate_bias", "down_bias"} | {"norm"}
    for path, variable in nnx.to_flat_state(updates):
        expected = 0 if spared & set(path) else -0.1
        np.testing.assert_allclose(variable.get_value(), expected, rtol=1e-6, err_msg=str(path))


def test_convolution_weights_are_decayed():
    assert any(
        axes == ("mamba_heads", "taps") for axes, _, _ in update(OptimizerConfig(learning_rate=1.0), gradient=0.0)
    )


@pytest.mark.parametrize(
    "axes, muon",
    [
        (("embed", "mlp"), True),
        (("expert", "expert_embed", "expert_mlp"), True),
        (("embed", None), True),
        (("expert", "expert_mlp"), False),
        (("vocab", "embed"), False),
        (("positions", "embed"), False),
        (("embed", "vocab"), False),
        (("mamba_heads", "taps"), False),
        (("mamba_heads", "state"), False),
        (("mamba_heads", None), True),
        (("norm",), False),
    ],
)
def test_muon_takes_matrices_inside_the_network(axes, muon):
    assert is_matrix(axes) is muon


def test_muon_orthogonalises_each_expert_and_layer_on_its_own():
    config = OptimizerConfig(name="muon", learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=1e9)
    rng = np.random.default_rng(1)
    updates, _ = apply(config, jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), parameters()))
    up = np.asarray(updates["backbone"]["children"][0]["children"][0]["mixer"]["experts"]["up"][...])
    assert up.shape == (2, 24, 24, 20)  # layers, experts, latent, hidden
    singular = np.linalg.svd(up, compute_uv=False)
    # Newton-Schulz brings singular values near one; the scale is 0.2 sqrt(max(in, out)) (arXiv:2502.16982).
    np.testing.assert_allclose(singular, 0.2 * 24**0.5, rtol=0.4)


@pytest.mark.parametrize("norm, clipped", [(20.0, 0.5), (0.5, 0.5), (0.25, 0.25), (0.0, 0.0)])
def test_clipping_is_by_the_global_norm(norm, clipped):
    params = parameters()
    each = norm / math.sqrt(sum(p.size for p in jax.tree.leaves(params)))
    _, state = apply(OptimizerConfig(learning_rate=1.0, clip_norm=0.5), full(each, params))
    moments = [np.asarray(m, np.float64) for m in jax.tree.leaves(optax.tree.get(state, "mu"))]
    moment = math.sqrt(sum((m**2).sum() for m in moments))  # (1 - beta1) of the clipped gradient
    assert float(moment) == pytest.approx(0.1 * clipped, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_kept_in_their_dtype_and_computed_with_in_float32(name):
    model = hybrid(pattern="*-", mtp_depths=0)
    params = jax.jit(lambda: initial_state(model, 0)[0])()
    grads = jax.tree.map(lambda p: np.float32(0.3) + np.asarray(p), params)
    results = []
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(name=name, learning_rate=1e-2, schedule="constant", moment_dtype=dtype)
        # Fusion decides where XLA rounds a product before adding it, and a moment's cast may change what is fused.
        results.append(first_update(config, model, without="fusion")(grads, params))
    (wide_updates, wide), (updates, narrow) = results
    # The first update is computed before anything is rounded.
    for mine, other in zip(*map(jax.tree.leaves, (updates, wide_updates)), strict=True):
        np.testing.assert_array_equal(mine, other)
    pairs = list(zip(*map(jax.tree.leaves, (narrow, wide)), strict=True))
    elements = sum(kept.size for kept, _ in pairs if kept.dtype == jnp.bfloat16)
    every = sum(p.size for p in jax.tree.leaves(params))
    assert elements == 2 * every if name == "adamw" else every < elements < 2 * every
    for kept, other in pairs:
        assert kept.size < 4 or kept.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kept, np.asarray(other).astype(kept.dtype))


def test_moments_follow_in_bfloat16_too():
    """After ten equal gradients the second moment is (1 - 0.95^10) g², up to the rounding of ten additions."""
    config = OptimizerConfig(learning_rate=1e-2, schedule="constant", moment_dtype="bfloat16", clip_norm=1e9)
    tx, params = make_optimizer(config, 10, build(MODEL).params), parameters()
    grads = full(0.5, params)
    state, step = jax.jit(tx.init)(params), jax.jit(tx.update)
    for _ in range(10):
        _, state = step(grads, state, params, grad_norm=np.float32(1))
    (adam,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu")]
    for moment in jax.tree.leaves(adam.nu):
        np.testing.assert_allclose(np.asarray(moment, np.float32), 0.25 * (1 - 0.95**10), rtol=10 * 2.0**-9)
