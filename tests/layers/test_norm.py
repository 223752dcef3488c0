"""Norms by hand, and groups that span several ranks. Letters: b batch, t time, d model, c channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.norm import GroupRMSNorm, LayerNorm, LayerNorm1P, RMSNorm, RMSNormCastFirst, make_norm
from orogen.model.lm import LanguageModel
from orogen.parallel.plan import Plan, make_plan


def plan_of(groups: int, norm_groups: int | None = None, **sizes: int) -> Plan:
    """A plan for a model of Mamba layers with that many groups, of B and C and of the norm."""
    model = ModelConfig(
        pattern="M", vocab_size=8, hidden_size=8, mamba_num_heads=8, mamba_head_dim=3, n_groups=groups,
        ssm_state_size=2, mamba_norm_groups=norm_groups,
    )  # fmt: skip
    return make_plan(PlanConfig(**sizes), model)


ONE = plan_of(1)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, 0.0)
    norm.weight[...] = jnp.array([2.0, 3.0])
    # The mean square of (1, 7) is 25.
    np.testing.assert_allclose(norm(jnp.array([[[1.0, 7.0]]]), ONE), [[[2 / 5, 21 / 5]]], rtol=1e-6)


def test_epsilon_is_added_to_the_mean_square():
    np.testing.assert_allclose(
        RMSNorm(2, 1.5)(jnp.ones((1, 1, 2)) * 0.5, ONE), np.full((1, 1, 2), 0.5 / 1.75**0.5), rtol=1e-6
    )


def test_statistics_are_float32_and_the_result_has_the_input_dtype():
    x_btd = jnp.full((1, 1, 4), 300.0, jnp.float16)  # its square overflows float16
    y_btd = RMSNorm(4, 0.0)(x_btd, ONE)
    assert y_btd.dtype == jnp.float16
    np.testing.assert_array_equal(y_btd, 1)


def test_weight_multiplies_before_the_result_is_rounded():
    norm = RMSNorm(2, 0.0)
    norm.weight[...] = jnp.full(2, 3.0)
    x_btd = jnp.array([[[1.0, 1.0078125]]], jnp.bfloat16)
    x32_btd = np.asarray(x_btd, np.float32)
    exact = x32_btd / np.sqrt(np.mean(x32_btd**2)) * 3
    np.testing.assert_array_equal(norm(x_btd, ONE), jnp.asarray(exact, jnp.bfloat16))


def test_cast_first_rounds_before_the_weight_multiplies():
    norm, later = RMSNormCastFirst(2, 0.0), RMSNorm(2, 0.0)
    # 5 / 7 and 1 / 7 of the root mean square; 3.01 is no bfloat16.
    norm.weight[...] = later.weight[...] = jnp.full(2, 3.01)
    x_btd = jnp.array([[[1.0, 7.0]]], jnp.bfloat16)
    rounded = jnp.array([0.2, 1.4], jnp.bfloat16)
    y_btd = norm(x_btd, ONE)
    assert y_btd.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_btd[0, 0], rounded * jnp.bfloat16(3.01))
    assert (y_btd != later(x_btd, ONE)).any()
    np.testing.assert_array_equal(norm(x_btd.astype(jnp.float32), ONE), later(x_btd.astype(jnp.float32), ONE))


def test_layer_norm_by_hand():
    norm = LayerNorm(3, 0.0)
    norm.weight[...], norm.bias[...] = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.0, -1.0])
    # Mean 4, deviations -3, 0, 3, their mean square 6.
    np.testing.assert_allclose(
        norm(jnp.array([[[1.0, 4.0, 7.0]]]), ONE), [[[0.5 - 3 / 6**0.5, 0, 9 / 6**0.5 - 1]]], rtol=1e-6
    )


def test_layer_norm_adds_epsilon_to_the_variance():
    np.testing.assert_allclose(LayerNorm(2, 3.0)(jnp.array([[[4.0, 6.0]]]), ONE), [[[-0.5, 0.5]]], rtol=1e-6)


def test_layer_norm_1p_stores_its_weight_less_one():
    norm, plain = LayerNorm1P(3, 1e-5), LayerNorm(3, 1e-5)
    x_btd = jnp.array([[[1.0, -2.0, 5.0]]])
    np.testing.assert_array_equal(norm.weight[...], 0)
    np.testing.assert_array_equal(norm(x_btd, ONE), plain(x_btd, ONE))
    norm.weight[...], plain.weight[...] = jnp.array([0.5, 0.0, -1.0]), jnp.array([1.5, 1.0, 0.0])
    norm.bias[...] = plain.bias[...] = jnp.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(norm(x_btd, ONE), plain(x_btd, ONE))


@pytest.mark.parametrize("norm", [LayerNorm, LayerNorm1P])
def test_layer_norms_compute_in_float32(norm):
    # A mean of 2048 leaves bfloat16 steps of 16 and squares that cancel; float32 statistics lose nothing.
    x_btd = jnp.array([[[2048.0, 2064.0, 2032.0, 2048.0]]], jnp.bfloat16)
    y_btd = norm(4, 0.0)(x_btd, ONE)
    assert y_btd.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_btd, jnp.array([[[0, 2**0.5, -(2**0.5), 0]]], jnp.bfloat16))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12, 1e-30, 0.0])
@pytest.mark.parametrize("name", ["rms", "rms_cast_first", "layer", "layer_1p"])
def test_tiny_rows_lose_nothing(name, epsilon):
    """Of sizes whose squares float32 has not: a norm without an epsilon does not see its input's size."""
    norm = NAMES[name](5, epsilon)
    x_d, dy_d = np.array([0.3, -1.7, 2.1, 0.9, -0.4]), np.array([1.1, 0.2, -0.7, 0.5, 2.0])
    sizes = np.array([1.0, 1e-12, 1e-20, 1e-30])
    centred_d = x_d - x_d.mean() if "layer" in name else x_d
    for size in sizes:
        y_btd, pullback = jax.vjp(lambda x: norm(x, ONE), jnp.asarray(size * x_d, jnp.float32)[None, None])
        root = np.sqrt((size * centred_d) @ (size * centred_d) / 5 + epsilon)
        unit_d = size * centred_d / root
        np.testing.assert_allclose(y_btd[0, 0], unit_d, rtol=1e-5)
        share_d = dy_d - dy_d.mean() if "layer" in name else dy_d
        dx_d = (share_d - unit_d * (unit_d @ dy_d) / 5) / root
        got_d = pullback(jnp.asarray(dy_d, jnp.float32)[None, None])[0][0, 0]
        np.testing.assert_allclose(got_d, dx_d, atol=1e-5 * np.abs(dx_d).max())


NAMES = {"rms": RMSNorm, "rms_cast_first": RMSNormCastFirst, "layer": LayerNorm, "layer_1p": LayerNorm1P}


@pytest.mark.parametrize("name", NAMES)
def test_config_names_the_norm_of_every_place(name):
    model = ModelConfig(
        pattern="-/-", vocab_size=8, hidden_size=6, intermediate_size=4, norm=name, layer_norm_epsilon=0.25
    )
    assert type(make_norm(model, 5)) is NAMES[name]
    assert make_norm(model, 5).weight[...].shape == (5,) and make_norm(model).weight[...].shape == (6,)
    built = LanguageModel(model, nnx.Rngs(0))
    assert built.mtp is not None
    block = built.mtp
    norms = [built.norm, built.backbone.children[0].norm, block.layers.children[0].norm]
    for norm in (*norms, block.embedding_norm, block.hidden_norm, block.final_norm):
        assert type(norm) is NAMES[name] and norm.epsilon == 0.25 and norm.weight[...].shape == (6,)


def test_group_norm_by_hand():
    norm = GroupRMSNorm(4, 2, 0.0)
    norm.weight[...] = jnp.array([1.0, 2.0, 3.0, 4.0])
    # Groups (3, 3) and (1, 7): root mean squares 3 and 5. Over all four channels it would be sqrt(17).
    y_btc = norm(jnp.array([[[3.0, 3.0, 1.0, 7.0]]]), None, plan_of(2))
    np.testing.assert_allclose(y_btc, [[[1, 2, 3 / 5, 28 / 5]]], rtol=1e-6)


SHARES = [(1, 1), (2, 2), (4, 4), (8, 8), (4, 1), (8, 2), (1, 4), (2, 1), (1, 2)]


@pytest.mark.parametrize(
    "mamba_groups, groups, epsilon, size", [*((*s, 1e-5, 1.0) for s in SHARES), (2, 1, 1e-52, 1e-25)]
)
def test_groups_over_ranks_equal_one_device(mamba_groups, groups, epsilon, size):
    """Tensor 4 has fewer ranks than, as many as, and more than there are groups, which B and C need not share; forward
    and gradients; and of tiny rows, which ranks enlarge alike."""
    channels = 24
    key_x, key_g, key_w = jax.random.split(jax.random.key(0), 3)
    x_btc, gy_btc = (jax.random.normal(key, (2, 5, channels)) for key in (key_x, key_g))
    x_btc *= size * jnp.arange(1, channels + 1)  # so that channels, ranks and groups differ in size
    graph, state = nnx.split(GroupRMSNorm(channels, groups, epsilon))
    state = jax.tree.map(lambda w: 1 + 0.3 * jax.random.normal(key_w, w.shape), state)

    def on(plan: Plan):
        def device(state, x_btc, gy_btc):
            def total(state, x_btc):
                y_btc = nnx.merge(graph, state)(x_btc, None, plan)
                return plan.total(jnp.sum(y_btc * gy_btc)), y_btc

            (_, y_btc), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(state, x_btc)
            return y_btc, *grads

        split, specs = plan.spec("batch", None, "mamba_heads"), plan.specs(state)
        run = plan.run(device, inputs=(specs, split, split), outputs=(split, specs, split))
        return jax.tree.leaves(jax.jit(run)(state, x_btc, gy_btc))

    for whole, split in zip(
        on(plan_of(mamba_groups, groups)), on(plan_of(mamba_groups, groups, data=2, tensor=4)), strict=True
    ):
        atol = 1e-5 * (1 if size == 1 else np.abs(whole).max())
        np.testing.assert_allclose(split, whole, rtol=2e-5, atol=atol)
        assert np.abs(whole).max() > 0.1
