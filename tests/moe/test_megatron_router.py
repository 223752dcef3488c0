"""The router against megatron-core 0.20: choices, weights, losses and all gradients of fixtures/router."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.moe.router import route, router_losses
from orogen.parallel.plan import make_plan
from orogen.train.step import update_bias

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "router"
CONFIG = ModelConfig(
    pattern="E", vocab_size=7, hidden_size=6, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=3
)


def cases(name: str) -> list[dict]:
    with np.load(FIXTURES / name) as arrays:
        return json.loads(str(arrays["meta"]))


def read(name: str, prefix: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def comparable(case: dict) -> bool:
    """Scores that we have; groups only where Megatron's score of a group, the sum of its best k / topk_group, is the
    sum of two as in Hugging Face's code and ours, or where every group is kept."""
    groups, kept = case["num_groups"], case["group_topk"]
    return score_of(case) is not None and (not groups or groups == kept or case["topk"] == 2 * kept)


def score_of(case: dict) -> str | None:
    """Our name of a case's score; Megatron's softmax is over the chosen logits unless it comes before the choice."""
    name = case["score_function"]
    if name == "softmax":
        return "softmax" if case.get("use_pre_softmax", True) else "softmax_topk"
    return name if name == "sigmoid" else None


ROUTES = [case for case in cases("topk.npz") if comparable(case)]
LOSSES = [case for case in cases("aux_losses.npz") if score_of(case)]


def identify(case: dict) -> str:
    return f"case{case['case']}"


def dense(routing, n_experts: int) -> jax.Array:
    """(n, e) weights with zero where an expert was not chosen."""
    hits_nke = jax.nn.one_hot(routing.experts, n_experts)
    return jnp.einsum("nke,nk->ne", hits_nke, routing.weights)


def test_enough_cases_are_comparable():
    for score, count, grouped in (("sigmoid", 28, 12), ("softmax", 14, 6), ("softmax_topk", 14, 6)):
        found = [case for case in ROUTES if score_of(case) == score]
        assert len(found) == count and sum(bool(case["num_groups"]) for case in found) == grouped
    assert [score_of(case) for case in LOSSES] == ["softmax"] * 6 + ["sigmoid"] * 6


@pytest.mark.parametrize("case", ROUTES, ids=identify)
def test_route_equals_megatron(case):
    arrays = read("topk.npz", f"c{case['case']}_")
    logits_ne = jnp.asarray(arrays["logits"])
    bias_e = jnp.asarray(arrays["bias"]) if case["expert_bias"] else jnp.zeros(16)

    # Megatron divides sigmoids only, and leaves a single expert's as it is; Hugging Face and we do as we are asked to.
    score, k = score_of(case), case["topk"]

    def weights(logits_ne):
        routing = route(
            logits_ne, bias_e, score=score, k=k, n_group=case["num_groups"] or 1, topk_group=case["group_topk"] or 1,
            normalise=score == "sigmoid" and k > 1, scaling=case["scaling_factor"] or 1.0,
        )  # fmt: skip
        return jnp.sum(dense(routing, 16) * arrays["gy"]), (dense(routing, 16), routing)

    grad_ne, (weights_ne, routing) = jax.grad(weights, has_aux=True)(logits_ne)
    np.testing.assert_array_equal(jax.nn.one_hot(routing.experts, 16).sum(1) > 0, arrays["map"])
    np.testing.assert_allclose(weights_ne, arrays["probs"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(grad_ne, arrays["glogits"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", LOSSES, ids=identify)
def test_balance_loss_and_z_loss_equal_megatron(case):
    arrays = read("aux_losses.npz", f"b{case['case']}_")
    logits_bte = jnp.asarray(arrays["logits"])[None]
    valid_bt = ~arrays.get("padding_mask", np.zeros(24, bool))[None]
    plan = make_plan(PlanConfig(), CONFIG)

    def losses(logits_bte):
        routing = route(logits_bte, None, score=score_of(case), k=case["topk"], normalise=False, scaling=1.0)
        return router_losses(logits_bte, routing.scores, jnp.asarray(valid_bt), plan, k=case["topk"])

    balance, z = losses(logits_bte)
    assert valid_bt.sum() == case["total_num_tokens"]
    np.testing.assert_allclose(case["coeff"] * balance, arrays["loss"], rtol=1e-6)
    np.testing.assert_allclose(case["z_coeff"] * z / valid_bt.sum(), arrays["zloss"], rtol=1e-6)
    grad_bte, grad_z_bte = (jax.grad(lambda x, i=i: losses(x)[i])(logits_bte) for i in range(2))
    np.testing.assert_allclose(case["coeff"] * grad_bte[0], arrays["glogits"], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(case["z_coeff"] * grad_z_bte[0] / valid_bt.sum(), arrays["gz"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("case", cases("expert_bias.npz"), ids=identify)
def test_bias_update_equals_megatron(case):
    arrays = read("expert_bias.npz", f"e{case['case']}_")
    np.testing.assert_array_equal(update_bias(arrays["bias"], arrays["tokens"], case["rate"]), arrays["new"])
