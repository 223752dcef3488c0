"""Every dispatch against `orogen.moe.reference`, on one device and on meshes that fold experts over other axes.

Letters: b batch, t time, d model, n tokens, k experts a token, e experts.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.moe.meshes import Inputs, assert_equal, config, inputs, layer_result, reference_result, weights

from orogen.config import plan as plan_config
from orogen.config.plan import PlanConfig
from orogen.cost.collectives import DISPATCH_COLLECTIVES
from orogen.layers.documents import Documents
from orogen.moe import dispatch as dispatches
from orogen.moe.dispatch import drop_margin, expert_capacity, rows_of_rank, within_capacity
from orogen.moe.layer import MoE, Replay
from orogen.moe.reference import Options, Weights, choose, largest, mixture
from orogen.parallel.plan import make_plan

# The expert axis is over nothing; data and tensor together; part of data with tensor; part of tensor; the outer half of
# tensor with expert_tensor inside; half of data with expert_tensor over tensor; expert_tensor over half of data; none,
# with expert_tensor over tensor.
MESHES = {
    "1": {},
    "4both": {"data": 2, "tensor": 2, "expert": 4},
    "8folded": {"data": 4, "tensor": 2, "expert": 4, "fsdp": "parameters"},
    "8tensor": {"data": 2, "tensor": 4, "expert": 2, "fsdp": "parameters"},
    "8shared": {"data": 2, "tensor": 4, "expert": 2, "expert_tensor": 2, "fsdp": "parameters"},
    "8wide": {"data": 4, "tensor": 2, "expert": 2, "expert_tensor": 2},
    "8cut": {"data": 4, "tensor": 2, "expert": 2, "expert_tensor": 4, "fsdp": "parameters"},
    "4cut": {"data": 4, "expert": 2, "expert_tensor": 2},
    "4sliced": {"data": 2, "tensor": 2, "expert_tensor": 2},
}
ROWS, LENGTH = 4, 12
DISPATCHES = ("allgather", "alltoall", "ragged")
# Correction biases: none to speak of; three experts that every token goes to, and five empty; two empty ones.
BIASES = {
    "spread": [0.1, 0, 0, -0.1, 0.2, 0, 0, 0],
    "three full": [0, 3, 0, 0, 0, 3, 3, 0],
    "two empty": [0.1, -3, 0, 0, 0.1, 0, -3, 0],
}


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
    model, sources = config(), (2, 2)
    given, data = weights(model, 0), inputs(model, 1, rows=ROWS, length=LENGTH)
    plan = PlanConfig(dispatch=dispatch, capacity_factor=0.75)
    expected = reference_result(model, given, data, sources=sources, capacity=4)  # ceil(12 · 3 / 8 · 3/4)
    assert expected.dropped > 0
    assert_equal(layer_result(model, plan, given, data, sources=(2, 1, 2)), expected)


def test_a_factor_beyond_all_numbers_is_room_for_every_token():
    assert expert_capacity(10, 3, 8, 1e308) == 10
    assert rows_of_rank(10, 3, ranks=2, local=4, factor=1e308) == 60


def test_the_margin_of_what_is_dropped_by_hand():
    # Expert 0 keeps tokens 0 and 1 where the replay keeps 0 and 2; expert 1 keeps one token more than the replay.
    idx_nk = jnp.array([[0], [0], [0], [1]])
    w_nk = jnp.array([[0.9], [0.5], [0.25], [0.7]])
    kept_nk, replayed_nk = jnp.array([[1], [1], [0], [1]]) > 0, jnp.array([[1], [0], [1], [0]]) > 0
    margin = lambda policy: drop_margin(idx_nk, w_nk, kept_nk, replayed_nk, n_experts=3, policy=policy)  # noqa: E731
    np.testing.assert_allclose(margin("probs"), [0, 0.25, 0.25, np.inf])
    np.testing.assert_array_equal(margin("position"), [0, np.inf, np.inf, np.inf])


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_what_was_dropped_is_replayed_and_noticed(policy):
    model, plan_config = config(), PlanConfig(capacity_factor=0.75, drop_policy=policy)
    plan, layer, data = make_plan(plan_config, model), MoE(model, nnx.Rngs(0)), inputs(model, 1, rows=2, length=LENGTH)

    docs = Documents(data.segments_bt, data.segments_bt)

    def changed(changed_btk):
        own = layer(data.x_btd, docs, plan)[1].choice.replay
        y_btd, stats = layer(data.x_btd, docs, plan, Replay(own.experts, own.kept ^ changed_btk))
        return y_btd, stats.choice, stats.dropped

    run = jax.jit(plan.run(changed, inputs=plan.spec(), outputs=plan.spec()))
    nothing = jnp.zeros((2, LENGTH, 3), bool)
    y_btd, choice, dropped = run(nothing)
    assert dropped > 0 and not choice.flipped.any()
    row, token, _ = np.argwhere(~choice.replay.kept & (data.segments_bt != 0)[..., None])[0]
    k = int(np.argmin(choice.replay.kept[row, token]))
    other_btd, noticed, still = run(nothing.at[row, token, k].set(True))
    assert still == dropped
    np.testing.assert_array_equal(np.argwhere(noticed.flipped), [[row, token]])
    assert math.isinf(noticed.margin[row, token])  # kept, and nothing dropped for it
    np.testing.assert_array_equal(np.argwhere(np.any(other_btd != y_btd, -1)), [[row, token]])


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dispatch_without_capacity_equals_reference_and_drops_nothing(dispatch, bias):
    model = config(moe_latent_size=None, moe_shared_expert_intermediate_size=None)
    given, data = weights(model, 2, bias=BIASES[bias]), inputs(model, 3, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    assert (expected.load_e == 0).sum() == {"spread": 0, "three full": 5, "two empty": 2}[bias]
    found = layer_result(model, PlanConfig(**MESHES["4both"], dispatch=dispatch), given, data)
    assert found.dropped == 0
    assert_equal(found, expected)
    np.testing.assert_array_equal(found.y_btd[data.segments_bt == 0], 0)
    np.testing.assert_array_equal(found.grads.up_ewf[expected.load_e == 0], 0)


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


# Every form meets each dispatch, and each mesh.
@pytest.mark.parametrize(
    ("form", "dispatch", "mesh"),
    [
        (form, dispatch, ("8folded", "1")[(i + j) % 2])
        for i, form in enumerate(FORMS)
        for j, dispatch in enumerate(DISPATCHES)
    ],
)
def test_every_form_of_expert_and_router_equals_reference(form, dispatch, mesh):
    plan = PlanConfig(**MESHES[mesh], dispatch=dispatch, capacity_factor=0.75)
    model = config(**FORMS[form])
    given, data = weights(model, 4), inputs(model, 5, rows=ROWS, length=LENGTH)
    capacity = -(-ROWS * LENGTH // plan.devices * 3 * 3 // (8 * 4))  # ceil(tokens · k / e · 3/4)
    expected = reference_result(model, given, data, sources=(plan.data, plan.tensor), capacity=capacity)
    assert expected.dropped > 0
    assert_equal(layer_result(model, plan, given, data), expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_biases_of_empty_experts_have_no_gradient(dispatch):
    model = config(**FORMS["biased"] | {"n_group": 1})
    given, data = weights(model, 2, bias=BIASES["three full"]), inputs(model, 3, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    assert (expected.load_e == 0).sum() == 5
    found = layer_result(model, PlanConfig(**MESHES["4both"], dispatch=dispatch), given, data)
    assert_equal(found, expected)
    for grad_ef in (found.grads.up_bias_ef, found.grads.down_bias_ew):
        np.testing.assert_array_equal(np.abs(grad_ef).sum(1) == 0, expected.load_e == 0)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_token_may_go_to_every_expert(dispatch):
    model = config(n_routed_experts=4, num_experts_per_tok=4, n_group=2, topk_group=2, moe_latent_size=None)
    given, data = weights(model, 8), inputs(model, 9, rows=2, length=6)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    np.testing.assert_array_equal(expected.load_e, [(data.segments_bt != 0).sum()] * 4)
    assert_equal(layer_result(model, PlanConfig(data=2, expert=2, dispatch=dispatch), given, data), expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dropped_tokens_by_hand(dispatch):
    # 6 tokens, 3 experts, k = 1: capacity ceil(6 / 3 · 1) = 2. Tokens 0 1 2 4 5 want expert 0, token 3 expert 2, and
    # token 1 is padding: expert 0 takes tokens 0 and 2, and tokens 4 and 5 are dropped.
    model = config(
        n_routed_experts=3, num_experts_per_tok=1, moe_latent_size=None, moe_shared_expert_intermediate_size=None
    )
    plan = PlanConfig(dispatch=dispatch, capacity_factor=1.0)
    gate_de = 4 * np.eye(20)[:, :3]
    x_btd = np.eye(20)[[0, 0, 0, 2, 0, 0]][None]
    given = weights(model, 10, bias=np.zeros(3))._replace(gate_de=jnp.asarray(gate_de, jnp.float32))
    data = Inputs(jnp.asarray(x_btd, jnp.float32), jnp.array([[1, 0, 1, 1, 1, 1]]), jnp.ones((1, 6, 20)))
    found = layer_result(model, plan, given, data)
    assert found.dropped == 2
    np.testing.assert_array_equal(found.load_e, [4, 0, 1])
    np.testing.assert_array_equal(np.abs(found.y_btd[0]).sum(-1) > 0, [True, False, True, True, False, False])
    up_df, down_fd = given.up_ewf[0], given.down_efw[0]
    expected_d = 2.5 * np.maximum(np.asarray(up_df)[0], 0) ** 2 @ np.asarray(down_fd)  # x is a unit vector
    np.testing.assert_allclose(found.y_btd[0, 0], expected_d, rtol=1e-5)
    # And with all of them at expert 1, which keeps the first two that are not padding:
    crowded = given._replace(bias_e=jnp.array([0.0, 3.0, 0.0]))
    found = layer_result(model, plan, crowded, data)
    assert found.dropped == 3
    np.testing.assert_array_equal(found.load_e, [0, 5, 0])
    assert_equal(found, reference_result(model, crowded, data, sources=(1, 1), capacity=2))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_values_at_padding_reach_no_token(dispatch):
    model = config()
    given, data = weights(model, 11), inputs(model, 12, rows=ROWS, length=LENGTH)
    padding_bt1 = (data.segments_bt == 0)[..., None]
    assert padding_bt1.any()
    changed = data._replace(x_btd=jnp.where(padding_bt1, 100 * data.x_btd[::-1], data.x_btd))
    plan = PlanConfig(dispatch=dispatch, capacity_factor=0.75)
    before, after = (layer_result(model, plan, given, d) for d in (data, changed))
    np.testing.assert_array_equal(*(np.where(padding_bt1, 0, r.y_btd) for r in (before, after)))
    np.testing.assert_array_equal(before.load_e, after.load_e)
    np.testing.assert_array_equal(before.losses, after.losses)
    assert before.dropped == after.dropped > 0


def test_capacity_by_hand():
    # Expert 0's queue is tokens 0, 2, 3, as token 1 is padding; expert 1's the same; expert 2 has padding only.
    idx_nk = jnp.array([[0, 1], [0, 2], [0, 1], [1, 0]])
    valid_n = jnp.array([True, False, True, True])
    w_nk = jnp.array([[0.3, 0.2], [0.9, 0.9], [0.5, 0.2], [0.4, 0.5]])
    kept = within_capacity(idx_nk, w_nk, valid_n, policy="position", n_experts=3, capacity=2)
    np.testing.assert_array_equal(kept, [[True, True], [False, False], [True, True], [False, False]])
    kept = within_capacity(idx_nk, w_nk, valid_n, policy="position", n_experts=3, capacity=1)
    np.testing.assert_array_equal(kept, [[True, True], [False, False], [False, False], [False, False]])
    kept = within_capacity(idx_nk, w_nk, valid_n, policy="position", n_experts=3, capacity=3)
    np.testing.assert_array_equal(kept, [[True, True], [False, False], [True, True], [True, True]])


def test_the_largest_weights_by_hand():
    # Expert 0 is wanted by tokens 0, 2 and 3 with 0.3, 0.5 and 0.5, expert 1 with 0.2, 0.2 and 0.4.
    idx_nk = jnp.array([[0, 1], [0, 2], [0, 1], [1, 0]])
    w_nk = jnp.array([[0.3, 0.2], [0.9, 0.9], [0.5, 0.2], [0.4, 0.5]])
    valid_n = jnp.array([True, False, True, True])
    kept = within_capacity(idx_nk, w_nk, valid_n, n_experts=3, capacity=2, policy="probs")
    np.testing.assert_array_equal(kept, [[False, True], [False, False], [True, False], [True, True]])
    kept = within_capacity(idx_nk, w_nk, valid_n, n_experts=3, capacity=1, policy="probs")
    np.testing.assert_array_equal(kept, [[False, False], [False, False], [True, False], [True, False]])


@pytest.mark.parametrize("wanting", [2, 3, 4])
def test_the_token_after_the_last_place_is_the_first_dropped(wanting):
    idx_nk = jnp.array([[1]] * wanting + [[0]] * (5 - wanting))
    kept = within_capacity(
        idx_nk, jnp.ones(idx_nk.shape), jnp.ones(5, bool), n_experts=2, capacity=3, policy="position"
    )
    np.testing.assert_array_equal(kept[:wanting, 0], np.arange(wanting) < 3)
    assert kept[wanting:].all()


def test_capacity_is_rounded_up_and_never_above_the_tokens():
    assert expert_capacity(7, 2, 3, 1.0) == 5  # 4.67
    assert expert_capacity(7, 2, 3, 0.6) == 3  # 2.8
    assert expert_capacity(6, 2, 3, 1.0) == 4
    assert expert_capacity(7, 2, 3, 9.0) == 7
    assert expert_capacity(7, 2, 3, None) == 7


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


@pytest.mark.parametrize("mesh", ["4both", "8shared", "8wide"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_every_token_to_one_expert(mesh, dispatch):
    model = config(num_experts_per_tok=1, mlp_bias=True)
    given = weights(model, 21, bias=3.0 * (np.arange(8) == 5))
    data = inputs(model, 22, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    np.testing.assert_array_equal(expected.load_e, (data.segments_bt != 0).sum() * (np.arange(8) == 5))
    assert_equal(layer_result(model, PlanConfig(**MESHES[mesh], dispatch=dispatch), given, data), expected)


@pytest.mark.parametrize("sizes", [{"expert": 4}, {"expert": 2, "expert_tensor": 2}], ids=["whole", "shared"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_twenty_two_of_512_experts(dispatch, sizes):
    model = config(n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2)
    given, data = weights(model, 15), inputs(model, 16, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    assert (expected.load_e == 0).any()
    assert_equal(layer_result(model, PlanConfig(data=2, tensor=2, **sizes, dispatch=dispatch), given, data), expected)


@pytest.mark.parametrize("mesh", ["4both", "8shared", "8wide", "4cut", "4sliced"])
@pytest.mark.parametrize("capacity_factor", [None, 1.5])
def test_rows_without_room_are_counted_and_those_with_room_arrive(capacity_factor, mesh):
    """Every token goes to experts 1, 5 and 6, so to the ranks that hold them; half an even share of room."""
    model, length = config(), 2 * LENGTH
    given, data = weights(model, 17, bias=BIASES["three full"]), inputs(model, 18, rows=ROWS, length=length)
    plan = PlanConfig(
        **MESHES[mesh], dispatch="ragged", buffer_factor=0.5, capacity_factor=capacity_factor
    )  # drops first
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    np.testing.assert_array_equal(np.nonzero(expected.load_e)[0], [1, 5, 6])
    tokens = ROWS * length // plan.devices
    valid_bt = np.asarray(data.segments_bt != 0)
    kept_bt = valid_bt if capacity_factor is None else first(valid_bt, plan, math.ceil(tokens * 3 / 8 * 1.5))
    lost = without_room(kept_bt, plan, math.ceil(tokens * 3 / 2))
    assert lost
    found = layer_result(model, plan, given, data)
    assert found.overflow == len(lost)
    assert found.dropped == 3 * (valid_bt & ~kept_bt).sum()
    np.testing.assert_array_equal(found.load_e, expected.load_e)
    whole_bt = kept_bt.copy()
    whole_bt.reshape(-1)[[token for token, _ in lost]] = False
    assert whole_bt.any()
    error_bt = np.abs(found.y_btd - expected.y_btd).max(-1)
    np.testing.assert_array_equal(error_bt > 1e-5 * np.abs(expected.y_btd).max(), valid_bt & ~whole_bt)


def pieces(plan: PlanConfig, x_bt: np.ndarray) -> list[np.ndarray]:
    """The part of `x_bt` that each rank holds."""
    return [piece for rows in np.split(x_bt, plan.data) for piece in np.split(rows, plan.tensor, 1)]


def first(valid_bt: np.ndarray, plan: PlanConfig, capacity: int) -> np.ndarray:
    """The first `capacity` valid tokens of each rank."""
    kept_bt = valid_bt.copy()
    for piece in pieces(plan, kept_bt):
        piece &= np.cumsum(piece).reshape(piece.shape) <= capacity
    return kept_bt


def without_room(valid_bt: np.ndarray, plan: PlanConfig, room: int) -> list[tuple[int, int]]:
    """The assignments (token, expert) that come to a full buffer, where every token wants experts 1, 5 and 6: by loops
    over groups of expert ranks, receivers, senders, the receiver's experts and the sender's tokens."""
    token_bt = np.arange(valid_bt.size).reshape(valid_bt.shape)
    tokens = [t[valid] for t, valid in zip(pieces(plan, token_bt), pieces(plan, valid_bt), strict=True)]
    devices = np.arange(plan.devices).reshape(-1, plan.expert, plan.expert_tensor)
    lost = []
    for senders in devices.swapaxes(1, 2).reshape(-1, plan.expert):
        for held in np.split(np.arange(8), plan.expert):
            queue = [
                (token, expert) for sender in senders for expert in (1, 5, 6) if expert in held
                for token in tokens[sender].tolist()
            ]  # fmt: skip
            lost += queue[room:]
    return lost


@pytest.mark.parametrize("mesh", ["4both", "8shared"])
def test_buffers_with_room_lose_nothing(mesh):
    model = config()
    given, data = weights(model, 17, bias=BIASES["three full"]), inputs(model, 18, rows=ROWS, length=2 * LENGTH)
    expected = reference_result(model, given, data, sources=(1, 1), capacity=None)
    for factor in (8.0, None):
        found = layer_result(model, PlanConfig(**MESHES[mesh], dispatch="ragged", buffer_factor=factor), given, data)
        assert found.overflow == 0
        assert_equal(found, expected)


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
    monkeypatch.setitem(DISPATCH_COLLECTIVES, "backwards", DISPATCH_COLLECTIVES["allgather"])
    model, plan = config(moe_intermediate_size=12), PlanConfig(**MESHES["4both"], dispatch="backwards")
    given, data = weights(model, 0), inputs(model, 1, rows=ROWS, length=LENGTH)
    expected = reference_result(model, given, data, sources=(2, 2), capacity=None)
    assert_equal(layer_result(model, plan, given, data), expected)


def test_every_table_has_each_dispatch_and_no_other():
    assert set(plan_config.DISPATCHES) == set(dispatches.DISPATCHES) == set(DISPATCH_COLLECTIVES) == set(DISPATCHES)
