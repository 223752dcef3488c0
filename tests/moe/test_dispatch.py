"""Every dispatch against `orogen.moe.reference`, on one device and on meshes that fold experts over other axes.

Letters: b batch, t time, d model, n tokens, k experts a token, e experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.moe.meshes import (
    BIASES,
    DISPATCHES,
    LENGTH,
    MESHES,
    ROWS,
    assert_equal,
    config,
    inputs,
    layer_result,
    reference_result,
    weights,
)

from orogen.config import plan as plan_config
from orogen.config.plan import PlanConfig
from orogen.cost.dispatches import DISPATCH_COSTS
from orogen.moe import dispatch as dispatches
from orogen.moe.reference import Options, Weights, choose, largest, mixture


# Which assignments stay is settled before they are dispatched: every dispatch meets each policy on every other mesh.
@pytest.mark.parametrize(
    ("mesh", "dispatch", "policy"),
    [
        (mesh, dispatch, ("position", "probs")[(i + j) % 2])
        for i, mesh in enumerate(MESHES)
        for j, dispatch in enumerate(DISPATCHES)
    ],
)
def test_dispatch_with_drops_equals_reference(mesh, dispatch, policy):
    plan = PlanConfig(**MESHES[mesh], dispatch=dispatch, capacity_factor=0.75, drop_policy=policy)
    # A size that every expert_tensor above divides, and biases, which ranks that share an expert add once.
    model = config(moe_intermediate_size=12, mlp_bias=True)
    given, data = weights(model, 0), inputs(model, 1, rows=ROWS, length=LENGTH)
    tokens = ROWS * LENGTH // plan.devices
    capacity = -(-tokens * 3 * 3 // (8 * 4))  # ceil(tokens · k / e · 3/4)
    expected = reference_result(model, given, data, sources=(plan.data, plan.tensor), capacity=capacity, policy=policy)
    assert 0 < expected.dropped < expected.load_e.sum() == 3 * (data.segments_bt != 0).sum()
    assert_equal(layer_result(model, plan, given, data), expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_one_device_drops_what_the_ranks_it_stands_for_would(dispatch):
    """And values at padding reach no token."""
    model, sources = config(), (2, 2)
    given, data = weights(model, 0), inputs(model, 1, rows=ROWS, length=LENGTH)
    plan = PlanConfig(dispatch=dispatch, capacity_factor=0.75)
    expected = reference_result(model, given, data, sources=sources, capacity=4)  # ceil(12 · 3 / 8 · 3/4)
    assert expected.dropped > 0
    found = layer_result(model, plan, given, data, sources=(2, 1, 2))
    assert_equal(found, expected)
    padding_bt1 = (data.segments_bt == 0)[..., None]
    assert padding_bt1.any()
    changed = data._replace(x_btd=jnp.where(padding_bt1, 100 * data.x_btd[::-1], data.x_btd))
    after = layer_result(model, plan, given, changed, sources=(2, 1, 2))
    np.testing.assert_array_equal(*(np.where(padding_bt1, 0, r.y_btd) for r in (found, after)))
    np.testing.assert_array_equal(found.load_e, after.load_e)
    np.testing.assert_array_equal(found.losses, after.losses)
    assert found.dropped == after.dropped


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dispatch_without_capacity_equals_reference_and_drops_nothing(dispatch, bias):
    model = config(moe_latent_size=None, moe_shared_expert_intermediate_size=None, mlp_bias=True)
    given, data = weights(model, 2, bias=BIASES[bias]), inputs(model, 3, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    assert (expected.load_e == 0).sum() == {"spread": 0, "three full": 5, "two empty": 2}[bias]
    found = layer_result(model, PlanConfig(**MESHES["4both"], dispatch=dispatch), given, data)
    assert found.dropped == 0
    assert_equal(found, expected)
    np.testing.assert_array_equal(found.y_btd[data.segments_bt == 0], 0)
    np.testing.assert_array_equal(found.grads.up_ewf[expected.load_e == 0], 0)
    for grad_ef in (found.grads.up_bias_ef, found.grads.down_bias_ew):  # an empty expert's biases have no gradient
        np.testing.assert_array_equal(np.abs(grad_ef).sum(1) == 0, expected.load_e == 0)


# gpt-oss: clamped SwiGLU with biases, softmax over the chosen; Qwen2: SwiGLU, softmax over all, a gated shared expert;
# Nemotron with biases, its experts in a latent space.
FORMS = {
    "clamped": {
        "mlp_gated": True, "mlp_hidden_act": "silu", "mlp_bias": True, "swiglu_limit": 0.7, "moe_latent_size": None,
        "router_score": "softmax_topk", "router_bias": True, "router_correction_bias": False,
        "moe_shared_expert_intermediate_size": None,
    },
    "gated": {
        "mlp_gated": True, "mlp_hidden_act": "silu", "router_score": "softmax", "norm_topk_prob": False,
        "moe_shared_expert_gate": True, "router_correction_bias": False, "moe_latent_size": None,
    },
    "biased": {"mlp_bias": True, "n_group": 2, "topk_group": 1},
}  # fmt: skip


# On one device no dispatch sends anything: one of them meets every form there.
@pytest.mark.parametrize(
    ("form", "dispatch", "mesh"),
    # Only what has biases differs between dispatches, in rows that are filled up or empty.
    [(form, dispatch, "8folded") for form in ("clamped", "biased") for dispatch in DISPATCHES]
    + [("gated", "alltoall", "8folded")]
    + [(form, "allgather", "1") for form in FORMS],
)
def test_every_form_of_expert_and_router_equals_reference(form, dispatch, mesh):
    plan = PlanConfig(**MESHES[mesh], dispatch=dispatch, capacity_factor=0.75)
    model = config(**FORMS[form])
    given, data = weights(model, 4), inputs(model, 5, rows=ROWS, length=LENGTH)
    capacity = -(-ROWS * LENGTH // plan.devices * 3 * 3 // (8 * 4))  # ceil(tokens · k / e · 3/4)
    expected = reference_result(model, given, data, sources=(plan.data, plan.tensor), capacity=capacity)
    assert expected.dropped > 0
    assert_equal(layer_result(model, plan, given, data), expected)


@pytest.mark.parametrize(("form", "mesh"), [("clamped", "8folded"), ("gated", "4sliced"), ("biased", "8shared")])
def test_rows_that_name_their_expert_equal_reference(form, mesh, monkeypatch):
    """As those of a few tokens do on a GPU, which are not sorted."""
    asked = []
    prefers = lambda implementation, results: asked.append((implementation, results)) or True  # noqa: E731
    monkeypatch.setattr(dispatches, "prefers_named", prefers)
    plan = PlanConfig(**MESHES[mesh], capacity_factor=0.75, grouped_matmul="reference")
    model = config(**FORMS[form], moe_intermediate_size=12)
    given, data = weights(model, 4), inputs(model, 5, rows=ROWS, length=LENGTH)
    capacity = -(-ROWS * LENGTH // plan.devices * 3 * 3 // (8 * 4))
    expected = reference_result(model, given, data, sources=(plan.data, plan.tensor), capacity=capacity)
    assert expected.dropped > 0
    assert_equal(layer_result(model, plan, given, data), expected)
    assert set(asked) == {("reference", ROWS * LENGTH * 3 // plan.devices * plan.expert * plan.expert_tensor)}


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_token_may_go_to_every_expert(dispatch):
    model = config(n_routed_experts=4, num_experts_per_tok=4, n_group=2, topk_group=2, moe_latent_size=None)
    given, data = weights(model, 8), inputs(model, 9, rows=2, length=6)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    np.testing.assert_array_equal(expected.load_e, [(data.segments_bt != 0).sum()] * 4)
    assert_equal(layer_result(model, PlanConfig(data=2, expert=2, dispatch=dispatch), given, data), expected)


def test_reference_by_hand():
    # Scores 3/4, 1/2, 1/4; k = 2: 3/5 of expert 0's answer (2x)² and 2/5 of expert 1's (3x)². Capacity 1 keeps token 0.
    given = Weights(
        gate_de=jnp.log(jnp.array([[3.0, 1.0, 1 / 3]])), bias_e=jnp.zeros(3),
        up_ewf=jnp.array([[[2.0]], [[3.0]], [[5.0]]]), down_efw=jnp.ones((3, 1, 1)),
    )  # fmt: skip
    answer = jax.jit(mixture, static_argnums=3)(jnp.ones((2, 1)), jnp.ones(2, bool), given, Options(k=2, capacity=1))
    np.testing.assert_allclose(answer.y_nd, [[0.6 * 4 + 0.4 * 9], [0]], rtol=1e-6)
    np.testing.assert_array_equal(answer.load_e, [2, 2, 0])
    assert answer.dropped == 2
    np.testing.assert_array_equal(largest(jnp.array([1.0, 2.0, 2.0, 0.0, 2.0]), 2), [False, True, True, False, False])
    grouped = choose(jnp.array([-0.25, -0.5, -0.2, -0.75]), Options(k=2, n_group=2, topk_group=1))
    np.testing.assert_array_equal(grouped, [True, True, False, False])


@pytest.mark.parametrize(
    ("dispatch", "policy"), [("allgather", "probs"), ("alltoall", "position"), ("ragged", "probs")]
)
def test_an_even_share_of_room_drops_what_a_few_full_experts_are_sent_beyond_it(dispatch, policy):
    """Capacity factor 1, and every token to three of eight experts: of a rank's 12 tokens each of them takes 5."""
    model, plan = config(), PlanConfig(**MESHES["8shared"], dispatch=dispatch, capacity_factor=1.0, drop_policy=policy)
    given, data = weights(model, 19, bias=BIASES["three full"]), inputs(model, 20, rows=ROWS, length=2 * LENGTH)
    expected = reference_result(model, given, data, sources=(2, 4), capacity=5, policy=policy)
    tokens_s = np.asarray(data.segments_bt != 0).reshape(2, 2, 4, 6).sum((1, 3)).reshape(-1)
    assert expected.dropped == 3 * np.maximum(tokens_s - 5, 0).sum() > expected.load_e.sum() / 3
    found = layer_result(model, plan, given, data)
    assert found.overflow == 0
    assert_equal(found, expected)


@pytest.mark.parametrize("mesh", ["8shared", "8wide"])  # on 4both three experts are as full, above
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_token_to_one_expert(mesh, dispatch):
    model = config(num_experts_per_tok=1, mlp_bias=True)
    given = weights(model, 21, bias=3.0 * (np.arange(8) == 5))
    data = inputs(model, 22, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    np.testing.assert_array_equal(expected.load_e, (data.segments_bt != 0).sum() * (np.arange(8) == 5))
    assert_equal(layer_result(model, PlanConfig(**MESHES[mesh], dispatch=dispatch), given, data), expected)


@pytest.mark.parametrize(
    ("dispatch", "sizes"),
    [
        ("allgather", {"expert": 2, "expert_tensor": 2}), ("alltoall", {"expert": 4}),
        ("ragged", {"expert": 2, "expert_tensor": 2}),
    ],
)  # fmt: skip
def test_twenty_two_of_512_experts(dispatch, sizes):
    model = config(n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2)
    given, data = weights(model, 15), inputs(model, 16, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    assert (expected.load_e == 0).any()
    assert_equal(layer_result(model, PlanConfig(data=2, tensor=2, **sizes, dispatch=dispatch), given, data), expected)


class Backwards:
    """As `AllGather`, with each token's choices in the opposite order."""

    @staticmethod
    def dispatch(x_nd, idx_nk, keep_nk, plan, **sizes):
        return dispatches.AllGather.dispatch(x_nd, idx_nk[:, ::-1], keep_nk[:, ::-1], plan, **sizes)

    @staticmethod
    def combine(rows, w_nk, ticket, plan):
        return dispatches.AllGather.combine(rows, w_nk[:, ::-1], ticket, plan)


def test_a_new_dispatch_is_added_as_the_docs_say(monkeypatch):
    monkeypatch.setitem(dispatches.DISPATCHES, "backwards", Backwards)
    monkeypatch.setattr(plan_config, "DISPATCHES", [*plan_config.DISPATCHES, "backwards"])
    monkeypatch.setitem(DISPATCH_COSTS, "backwards", DISPATCH_COSTS["allgather"])
    model, plan = config(moe_intermediate_size=12), PlanConfig(**MESHES["4both"], dispatch="backwards")
    given, data = weights(model, 0), inputs(model, 1, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(2, 2), capacity=None)
    assert_equal(layer_result(model, plan, given, data), expected)


def test_every_table_has_each_dispatch_and_no_other():
    assert set(plan_config.DISPATCHES) == set(dispatches.DISPATCHES) == set(DISPATCH_COSTS) == set(DISPATCHES)
