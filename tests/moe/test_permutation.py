"""The permutation by expert against megatron-core 0.20's permute and unpermute (fixtures/router/permute.npz).

There expert e answers tanh(w · x), w the same for all. Cases with capacity come with the map that is left after
dropping; those that are padded fill the experts' places with other tokens of weight zero, and we do with zeros.

Letters: n tokens, k experts a token, d width, e experts, r rows.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.moe import dispatch
from orogen.moe.dispatch import DISPATCHES
from orogen.parallel.plan import Plan, make_plan

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "router" / "permute.npz"
EXPERTS = 8
with np.load(FIXTURE) as _arrays:
    CASES = json.loads(str(_arrays["meta"]))


def read(case: dict) -> dict[str, np.ndarray]:
    prefix = f"p{case['case']}_"
    with np.load(FIXTURE) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def plan_of(dispatch: str) -> Plan:
    model = ModelConfig(
        pattern="E", vocab_size=4, hidden_size=5, n_routed_experts=EXPERTS, num_experts_per_tok=1,
        moe_intermediate_size=2,
    )  # fmt: skip
    return make_plan(PlanConfig(dispatch=dispatch), model)


def assignments(arrays: dict[str, np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts (n, k) of each token and which of them are left; a token's others are experts that it does not use."""
    kept_ne = arrays["map"] & (arrays["probs"] > 0)
    idx_nk = np.argsort(~kept_ne, axis=1, kind="stable")[:, :k]
    return idx_nk[:, ::-1], np.take_along_axis(kept_ne, idx_nk, 1)[:, ::-1]


def test_cases_drop_and_pad():
    assert len(CASES) == 24
    assert sum(case["drop_and_pad"] for case in CASES) == 12
    dropped = [case for case in CASES if not case["drop_and_pad"] and case["num_out_tokens"] < 20 * case["topk"]]
    assert len(dropped) == 6


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"case{case['case']}")
def test_rows_outputs_and_gradients_equal_megatron(case, dispatch):
    arrays, k, plan = read(case), case["topk"], plan_of(dispatch)
    idx_nk, keep_nk = assignments(arrays, k)
    capacity = case["capacity"] or len(idx_nk)

    @jax.jit
    def dispatched(x_nd):
        return DISPATCHES[dispatch].dispatch(
            x_nd, jnp.asarray(idx_nk, jnp.int32), jnp.asarray(keep_nk), plan, n_experts=EXPERTS, capacity=capacity
        )[:2]

    rows_rd, group_sizes = dispatched(jnp.asarray(arrays["x"]))
    left_ne = arrays["map"] & (arrays["probs"] > 0)
    sorted_rd = arrays["x"][np.nonzero(left_ne.T)[1]]
    if not case["drop_and_pad"]:
        np.testing.assert_array_equal(sorted_rd, arrays["permuted"])
    if dispatch == "alltoall":
        assert group_sizes == capacity
        filled_r = np.arange(capacity) < left_ne.sum(0)[:, None]
        np.testing.assert_array_equal(rows_rd[filled_r.reshape(-1)], sorted_rd)
        np.testing.assert_array_equal(rows_rd[~filled_r.reshape(-1)], 0)
    else:
        np.testing.assert_array_equal(group_sizes, left_ne.sum(0))
        np.testing.assert_array_equal(rows_rd[: len(sorted_rd)], sorted_rd)
        np.testing.assert_array_equal(rows_rd[len(sorted_rd) :], 0)

    def answer(x_nd, probs_ne):
        dispatcher = DISPATCHES[dispatch]
        idx, keep = jnp.asarray(idx_nk, jnp.int32), jnp.asarray(keep_nk)
        rows_rd, _, ticket = dispatcher.dispatch(x_nd, idx, keep, plan, n_experts=EXPERTS, capacity=capacity)
        w_nk = jnp.take_along_axis(probs_ne, idx, axis=1)
        return dispatcher.combine(jnp.tanh(rows_rd * arrays["w"]), w_nk, ticket, plan)

    y_nd, backward = jax.vjp(jax.jit(answer), *(jnp.asarray(arrays[name]) for name in ("x", "probs")))
    gx_nd, gprobs_ne = backward(jnp.asarray(arrays["gy"]))
    # Sums of at most 3 answers, each below 1 and a few roundings of 6e-8 off, of as many slopes times gy (at most 3.2)
    # and w (at most 1.8), and of 5 answers times gy.
    np.testing.assert_allclose(y_nd, arrays["y"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gx_nd, arrays["gx"], rtol=0, atol=5e-6)
    kept, expected = (np.where(left_ne, gradient, 0) for gradient in (gprobs_ne, arrays["gprobs"]))
    np.testing.assert_allclose(kept, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("few", [0, 1024])
def test_assignments_are_sorted_stably_however_few_they_are(monkeypatch, few):
    """By comparing all pairs or by a sort; what goes nowhere is last and has no row."""
    monkeypatch.setattr(dispatch, "FEW", few)
    flat = np.random.default_rng(0).integers(0, 5, 21)
    slots = np.argsort(np.argsort(flat, kind="stable"), kind="stable")
    np.testing.assert_array_equal(dispatch._slots(jnp.asarray(flat)), slots)
    rows = int((flat < 4).sum())
    slots_nk = np.where(flat < 4, slots, rows + 2).reshape(7, 3)
    source_r = np.full(rows + 2, flat.size)
    source_r[slots[flat < 4]] = np.flatnonzero(flat < 4)
    np.testing.assert_array_equal(dispatch._with_inverse(jnp.asarray(slots_nk), rows + 2)[1], source_r)
