"""The router by hand; test_megatron_router compares it with megatron-core."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.moe import router
from orogen.moe.router import Router, _top, expert_counts, global_balance, route, router_losses
from orogen.parallel.plan import make_plan
from orogen.precision.policy import working_copy
from orogen.train.step import update_bias

CONFIG = ModelConfig(
    pattern="E", vocab_size=7, hidden_size=6, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=3
)
# Scores 3/4, 1/2, 1/4, 4/5.
LOGITS_E = jnp.log(jnp.array([3.0, 1.0, 1 / 3, 4.0]))


by_sigmoid = functools.partial(route, score="sigmoid")


def test_route_by_hand():
    # Biased 0.75, 0.9, 0.25, 0.6: experts 1 and 0; shares 0.5 / 1.25 and 0.75 / 1.25, times 2.5.
    bias_e = jnp.array([0.0, 0.4, 0.0, -0.2])
    routing = by_sigmoid(LOGITS_E[None], bias_e, k=2, normalise=True, scaling=2.5)
    np.testing.assert_array_equal(routing.experts, [[1, 0]])
    np.testing.assert_allclose(routing.weights, [[1.0, 1.5]], rtol=1e-6)
    np.testing.assert_allclose(routing.scores, [[0.75, 0.5, 0.25, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(routing.margin, [0.75 - 0.6], rtol=1e-6)


def test_weights_without_normalisation_are_scaled_scores():
    routing = by_sigmoid(LOGITS_E[None], jnp.zeros(4), k=3, normalise=False, scaling=2.0)
    np.testing.assert_array_equal(routing.experts, [[3, 0, 1]])
    np.testing.assert_allclose(routing.weights, [[1.6, 1.5, 1.0]], rtol=1e-6)


# Shares of 3, 1, 1/3 and 4 in their sum of 25/3: 0.36, 0.12, 0.04, 0.48.


@pytest.mark.parametrize(("normalise", "expected"), [(False, [0.96, 0.72]), (True, [8 / 7, 6 / 7])])
def test_softmax_over_all_experts_by_hand(normalise, expected):
    routing = route(LOGITS_E[None], None, score="softmax", k=2, normalise=normalise, scaling=2.0)
    np.testing.assert_array_equal(routing.experts, [[3, 0]])
    np.testing.assert_allclose(routing.weights, [expected], rtol=1e-6)
    np.testing.assert_allclose(routing.scores, [[0.36, 0.12, 0.04, 0.48]], rtol=1e-6)
    np.testing.assert_allclose(routing.margin, [(0.36 - 0.12) / 0.36], rtol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_softmax_over_the_chosen_by_hand(normalise):
    # A bias of 1.2 takes expert 1's logit 0 above expert 0's log 3 = 1.1; its weight is by the logit: 1 / (4 + 1).
    bias_e = jnp.array([0.0, 1.2, 0.0, 0.0])
    routing = route(LOGITS_E[None], bias_e, score="softmax_topk", k=2, normalise=normalise, scaling=2.0)
    np.testing.assert_array_equal(routing.experts, [[3, 1]])
    np.testing.assert_allclose(routing.weights, [[1.6, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(routing.scores, [[0.36, 0.12, 0.04, 0.48]], rtol=1e-6)
    np.testing.assert_allclose(routing.margin, [1.2 - math.log(3)], rtol=1e-5)


def test_correction_bias_of_a_softmax_decides_the_choice_alone():
    bias_e = jnp.array([0.0, 0.3, 0.0, 0.0])
    routing = route(LOGITS_E[None], bias_e, score="softmax", k=2, normalise=False, scaling=1.0)
    np.testing.assert_array_equal(routing.experts, [[3, 1]])
    np.testing.assert_allclose(routing.weights, [[0.48, 0.12]], rtol=1e-6)


def test_margin_of_groups_counts_too():
    # Groups (0.75, 0.5) and (0.25, 0.8) score 1.25 and 1.05; inside the first nothing is left out.
    routing = by_sigmoid(LOGITS_E[None], None, k=2, n_group=2, topk_group=1, normalise=True, scaling=1.0)
    np.testing.assert_array_equal(routing.experts, [[0, 1]])
    np.testing.assert_allclose(routing.margin, [0.2], rtol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk"])
def test_replayed_choice_is_weighed_like_a_chosen_one(score):
    shares = [0.04, 0.48] if score == "softmax" else [1 / 13, 12 / 13]
    routing = route(
        LOGITS_E[None], None, score=score, k=2, normalise=False, scaling=1.0, experts_nk=jnp.array([[2, 3]])
    )
    np.testing.assert_array_equal(routing.flipped, [True])
    np.testing.assert_allclose(routing.weights, [shares], rtol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk"])
def test_scores_that_underflow_leave_finite_numbers(score):
    logits_ne = jnp.array([[300.0, 0.0, -1.0, -2.0]])
    routing = route(logits_ne, None, score=score, k=2, normalise=True, scaling=1.0)
    np.testing.assert_array_equal(routing.experts, [[0, 1]])
    np.testing.assert_array_equal(routing.weights, [[1, 0]])
    assert not np.isnan(routing.margin[0])


def test_router_bias_is_part_of_the_logits_and_learned():
    config = dataclasses.replace(CONFIG, router_bias=True, router_correction_bias=False, router_score="softmax_topk")
    graph, params, buffers = nnx.split(Router(config, nnx.Rngs(0)), nnx.Param, ...)
    assert not jax.tree.leaves(buffers)
    params["gate_bias"] = params["gate_bias"].replace(jnp.array([0.0, 9.0, 0.0, 8.0, 0.0]))
    plan = make_plan(PlanConfig(), config)
    x_btd = 0.1 * jax.random.normal(jax.random.key(1), (2, 3, 6))

    def first_weights(params):
        logits_bte, routing = nnx.merge(graph, params, buffers)(x_btd, plan, None)
        return routing.weights[..., 0].sum(), (logits_bte, routing)

    grads, (logits_bte, routing) = jax.grad(first_weights, has_aux=True)(params)
    np.testing.assert_allclose(logits_bte, x_btd @ params["gate"][...] + params["gate_bias"][...], rtol=1e-5)
    np.testing.assert_array_equal(routing.experts, np.broadcast_to([1, 3], (2, 3, 2)))
    assert grads["gate_bias"][...][1] > 0 > grads["gate_bias"][...][3] and grads["gate_bias"][...][0] == 0


def test_bias_has_no_gradient_and_does_not_change_weights():
    def total(bias_e):
        return jnp.sum(
            by_sigmoid(LOGITS_E[None], bias_e, k=2, normalise=True, scaling=1.0).weights * jnp.array([1.0, 3.0])
        )

    assert total(jnp.zeros(4)) == total(jnp.array([0.01, 0.0, 0.0, 0.02]))
    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros(4)), 0)


def test_ties_go_to_the_lower_index():
    routing = route(
        jnp.zeros((3, 6)), jnp.array([0.0, 0.5, 0.0, 0.5, 0.0, 0.0]), score="sigmoid", k=4, normalise=True, scaling=1.0
    )
    np.testing.assert_array_equal(routing.experts, [[1, 3, 0, 2]] * 3)
    np.testing.assert_array_equal(routing.margin, 0)


@pytest.mark.parametrize("k", [1, 5, 19, 20])
def test_the_best_of_few_scores_are_those_of_a_sort(k, monkeypatch):
    """With ties, both zeros, infinities, and what is no number."""
    values = np.random.default_rng(0).normal(size=(6, 3, 20)).astype(np.float32)
    values[0, 0, :5], values[0, 0, 3] = 0, -0.0
    values[1, 0, [4, 9]] = np.nan
    values[2, 1, :4], values[2, 2, :9] = np.inf, -np.inf
    values[3] = 1
    compared = _top(jnp.asarray(values), k, by_pairs=True)
    monkeypatch.setattr(router, "FEW", 0)
    order = np.asarray(jax.lax.top_k(values, 20)[1])
    for index, margin in (compared, _top(jnp.asarray(values), k, by_pairs=True)):
        np.testing.assert_array_equal(index, order[..., :k])
        best = np.take_along_axis(values, order, -1)
        with np.errstate(invalid="ignore"):  # of two infinities
            expected = best[..., k - 1] - best[..., k] if k < 20 else np.full((6, 3), np.inf)
        np.testing.assert_array_equal(margin, expected)


def test_ties_between_groups_go_to_the_lower_group():
    routing = route(
        jnp.zeros((1, 6)), jnp.zeros(6), score="sigmoid", k=2, n_group=3, topk_group=1, normalise=True, scaling=1.0
    )
    np.testing.assert_array_equal(routing.experts, [[0, 1]])


def test_masked_group_does_not_win_over_negative_biases():
    # Biased -0.25, -0.5 | -0.75, -0.2: the groups score -0.75 and -0.95, and the second one is out.
    routing = route(
        LOGITS_E[None], -jnp.ones(4), score="sigmoid", k=2, n_group=2, topk_group=1, normalise=True, scaling=1.0
    )
    np.testing.assert_array_equal(routing.experts, [[0, 1]])


def test_a_group_scores_by_its_best_two():
    # One very good expert (0.8 + 0.25 = 1.05 + smaller) against two good ones (0.75 + 0.5 = 1.25).
    routing = route(
        LOGITS_E[None], jnp.zeros(4), score="sigmoid", k=1, n_group=2, topk_group=1, normalise=False, scaling=1.0
    )
    np.testing.assert_array_equal(routing.experts, [[0]])


def test_groups_of_one_expert_score_by_it():
    routing = route(
        LOGITS_E[None], jnp.zeros(4), score="sigmoid", k=2, n_group=4, topk_group=3, normalise=False, scaling=1.0
    )
    np.testing.assert_array_equal(routing.experts, [[3, 0]])


def test_all_experts_chosen_leave_an_infinite_margin():
    routing = by_sigmoid(LOGITS_E[None], jnp.zeros(4), k=4, normalise=True, scaling=1.0)
    np.testing.assert_array_equal(routing.experts, [[3, 0, 1, 2]])
    np.testing.assert_allclose(routing.weights.sum(), 1, rtol=1e-6)
    assert math.isinf(routing.margin[0])


def test_replayed_choice_is_used_and_noticed():
    logits_ne = jnp.stack([LOGITS_E, LOGITS_E])
    replay_nk = jnp.array([[0, 3], [3, 2]])
    routing = by_sigmoid(logits_ne, jnp.zeros(4), k=2, normalise=True, scaling=1.0, experts_nk=replay_nk)
    np.testing.assert_array_equal(routing.experts, replay_nk)
    np.testing.assert_array_equal(routing.flipped, [False, True])
    np.testing.assert_allclose(routing.weights[1], np.array([0.8, 0.25]) / 1.05, rtol=1e-6)


def test_scores_that_all_underflow_give_finite_weights():
    routing = by_sigmoid(jnp.full((1, 4), -200.0), jnp.zeros(4), k=2, normalise=True, scaling=1.0)
    np.testing.assert_array_equal(routing.weights, 0)


@pytest.mark.parametrize("level", [-20.0, -45.0, -50.0, -60.0, -87.0, -100.0])
def test_gradients_of_weights_and_shares_are_right_where_scores_underflow(level: float):
    """Against float64 written out: d (s_i / D) = (ds_i - s_i / D · dD) / D, whatever D."""
    logits_ne = np.float32(level + np.array([[0.0, 0.3, -0.2, -2.0], [3.0, 0.1, 60.0, 61.0]]))
    dy_nk = np.array([[1.0, -3.0], [0.5, 2.0]])
    choice_nk = np.array([[1, 0], [0, 1]])
    plan = make_plan(PlanConfig(), CONFIG)

    def weighed(x_ne, i):
        if i == 0:
            routing = by_sigmoid(x_ne, None, k=2, normalise=True, scaling=1.0, experts_nk=jnp.asarray(choice_nk))
            return jnp.sum(routing.weights * dy_nk.astype(np.float32))
        return router_losses(x_ne[None], jax.nn.sigmoid(x_ne[None]), jnp.ones((1, 2), bool), plan, k=2).balance

    scores_ne = 1 / (1 + np.exp(-logits_ne.astype(np.float64)))

    def pulled(values, dvalues):
        total = values.sum(-1, keepdims=True) + 1e-20
        return (dvalues - (dvalues * values).sum(-1, keepdims=True) / total) / total

    top = np.argsort(-scores_ne, axis=1, kind="stable")[:, :2]
    counts_e = np.bincount(top.ravel(), minlength=4)
    want = np.zeros_like(scores_ne)
    np.put_along_axis(want, choice_nk, pulled(np.take_along_axis(scores_ne, choice_nk, 1), dy_nk), 1)
    slope_ne = scores_ne * (1 - scores_ne)
    grads = [jax.grad(weighed)(jnp.asarray(logits_ne), i) for i in range(2)]
    balance_ne = pulled(scores_ne, 4 * np.broadcast_to(counts_e / (2 * 2**2), (2, 4)))
    np.testing.assert_allclose(grads[0], want * slope_ne, rtol=2e-5, atol=1e-12)
    np.testing.assert_allclose(grads[1], balance_ne * slope_ne, rtol=2e-5, atol=1e-7)


def test_balance_loss_by_hand():
    # One row of two tokens, two experts, k = 1. Token 0 (3/4, 1/4) -> expert 0, token 1 (3/4, 3/4) -> expert 0 (tie):
    # f = (1, 0), P = ((3/4 + 1/2) / 2, ...), so 2 · 5/8. The third token is padding.
    logits_bte = jnp.log(jnp.array([[[3.0, 1 / 3], [3.0, 3.0], [1 / 3, 9.0]]]))
    valid_bt = jnp.array([[True, True, False]])
    losses = router_losses(logits_bte, jax.nn.sigmoid(logits_bte), valid_bt, make_plan(PlanConfig(), CONFIG), k=1)
    np.testing.assert_allclose(losses.balance, 1.25, rtol=1e-6)
    np.testing.assert_allclose(losses.z, math.log(3 + 1 / 3) ** 2 + math.log(6) ** 2, rtol=1e-6)


def test_global_balance_loss_by_hand():
    # The row above, and one of a token (1/4, 3/4) -> expert 1. Of all three tokens f = (2/3, 1/3), P = (1/2, 1/2), so
    # 2 · 1/2; row by row it is 5/4 and 2 · 3/4.
    logits_bte = jnp.log(jnp.array([[[3.0, 1 / 3], [3.0, 3.0], [1 / 3, 9.0]], [[1 / 3, 3.0], [9.0, 1.0], [9.0, 1.0]]]))
    valid_bt = jnp.array([[True, True, False], [True, False, False]])
    plan, scores_bte = make_plan(PlanConfig(), CONFIG), jax.nn.sigmoid(logits_bte)
    sums, z = router_losses(logits_bte, scores_bte, valid_bt, plan, k=1, balance="global")
    np.testing.assert_array_equal(sums.counts, [2, 1])
    np.testing.assert_allclose(sums.mass, [1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(global_balance(*sums, jnp.asarray(3.0), k=1), 1.0, rtol=1e-6)
    by_row = router_losses(logits_bte, scores_bte, valid_bt, plan, k=1)
    np.testing.assert_allclose([by_row.balance, by_row.z], [2.75, z], rtol=1e-6)


def test_balance_loss_sums_over_rows():
    key = jax.random.key(0)
    logits_bte = jax.random.normal(key, (3, 7, 5))
    valid_bt = jnp.arange(7) < jnp.array([7, 4, 0])[:, None]
    plan = make_plan(PlanConfig(), CONFIG)

    def balance(rows: slice):
        scores_bte = jax.nn.sigmoid(logits_bte[rows])
        return router_losses(logits_bte[rows], scores_bte, valid_bt[rows], plan, k=2).balance

    apart = [balance(slice(i, i + 1)) for i in range(3)]
    np.testing.assert_allclose(balance(slice(None)), sum(apart), rtol=1e-6)
    assert apart[2] == 0


def test_expert_counts_by_hand():
    counts_e = expert_counts(jnp.array([[0, 2], [2, 1]]), jnp.array([[True, True], [True, False]]), 4, axes=(0, 1))
    np.testing.assert_array_equal(counts_e, [1, 0, 2, 0])


def test_bias_update_by_hand():
    # Mean load 2: below it up, above it down, at it unchanged; each layer by itself.
    new = update_bias(jnp.zeros((2, 3)), jnp.array([[0.0, 2.0, 4.0], [6.0, 6.0, 6.0]]), 0.5)
    np.testing.assert_array_equal(new, [[0.5, 0, -0.5], [0, 0, 0]])


def test_router_computes_in_float32_from_bfloat16():
    """Logits of the master weights, which bfloat16 cannot hold, and the gradients of both, as in float64 but for sums'
    rounding."""
    graph, params, buffers = nnx.split(Router(CONFIG, nnx.Rngs(0)), nnx.Param, ...)
    master_de = np.random.default_rng(5).normal(size=(6, CONFIG.n_routed_experts)).astype(np.float32)
    params["gate"] = params["gate"].replace(jnp.asarray(master_de))
    x_btd = jax.random.normal(jax.random.key(1), (2, 3, 6)).astype(jnp.bfloat16)
    dlogits_bte = jax.random.normal(jax.random.key(2), (2, 3, CONFIG.n_routed_experts))

    def run(params, x_btd):
        router = nnx.merge(graph, working_copy(params, "bfloat16"), buffers)
        return router(x_btd, make_plan(PlanConfig(), CONFIG), None)

    logits_bte, back, routing = jax.vjp(run, params, x_btd, has_aux=True)
    dparams, dx_btd = back(dlogits_bte)
    assert logits_bte.dtype == routing.weights.dtype == dparams["gate"][...].dtype == jnp.float32
    assert dx_btd.dtype == jnp.bfloat16
    x, w, dy = (np.asarray(a, np.float64) for a in (x_btd, master_de, dlogits_bte))
    assert np.abs(x @ (w - w.astype(jnp.bfloat16).astype(np.float64))).max() > 1e-3  # what rounding it would change
    np.testing.assert_allclose(logits_bte, x @ w, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(dparams["gate"][...], np.einsum("btd,bte->de", x, dy), rtol=1e-6, atol=1e-6)
    scores_bte = 1 / (1 + np.exp(-x @ w))
    chosen_btk = np.argsort(-scores_bte, -1)[..., :2]
    np.testing.assert_array_equal(routing.experts, chosen_btk)
    weights_btk = np.take_along_axis(scores_bte, chosen_btk, -1)
    np.testing.assert_allclose(routing.weights, weights_btk / weights_btk.sum(-1, keepdims=True), rtol=1e-6)
    # Rounded once, at the end: to what float64 rounds to, but for the rare sum beside the middle of two numbers.
    np.testing.assert_allclose(dx_btd.astype(jnp.float32), dy @ w.T, rtol=2.0**-8)
    assert np.mean(np.asarray(dx_btd == jnp.asarray(dy @ w.T, jnp.bfloat16))) > 0.95
