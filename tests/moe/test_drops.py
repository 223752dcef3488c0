"""Which assignments stay where experts have a capacity, by hand.

Letters: b batch, t time, d model, n tokens, k experts per token.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.moe.meshes import (
    DISPATCHES,
    LENGTH,
    Inputs,
    assert_equal,
    config,
    inputs,
    layer_result,
    reference_result,
    weights,
)

from orogen.config.plan import PlanConfig
from orogen.layers.documents import Documents
from orogen.moe.dispatch import drop_margin, expert_capacity, rows_of_rank, within_capacity
from orogen.moe.layer import MoE, Replay
from orogen.parallel.plan import make_plan


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
