"""The whole layer against megatron-core 0.20's MoELayer (fixtures/megatron/moe_layer.npz): output and all gradients.

Of its cases, those with sigmoid scores, squared ReLU without a gate, and weights applied to the experts' outputs.
Megatron's hidden states are (t, b, d), its linear maps (out, in).
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.model.tensors import fill

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.documents import documents
from orogen.moe.layer import MoE
from orogen.parallel.plan import make_plan

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "megatron" / "moe_layer.npz"
EXPERTS = 8


def cases() -> list[dict]:
    with np.load(FIXTURE) as arrays:
        found = json.loads(str(arrays["meta"]))
    return [
        case
        for case in found
        if case.get("moe_router_score_function") == "sigmoid"
        and case["activation_func"] == "squared_relu"
        and not case["gated_linear_unit"]
        and not case.get("moe_apply_probs_on_input")
    ]


def read(case: dict) -> dict[str, np.ndarray]:
    prefix = f"m{case['case']}_"
    with np.load(FIXTURE) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def by_path(arrays: dict[str, np.ndarray], kind: str) -> dict:
    """Weights (kind "w") or gradients ("g") under our paths."""
    stack = lambda name: np.stack(  # noqa: E731
        [arrays[f"{kind}:experts.local_experts.{expert}.{name}.weight"].T for expert in range(EXPERTS)]
    )
    found = {
        ("router", "gate"): arrays[f"{kind}:router.weight"].T,
        ("experts", "up"): stack("linear_fc1"),
        ("experts", "down"): stack("linear_fc2"),
    }
    for path, name in {
        ("shared", "up"): "shared_experts.linear_fc1",
        ("shared", "down"): "shared_experts.linear_fc2",
        ("latent_down",): "fc1_latent_proj",
        ("latent_up",): "fc2_latent_proj",
    }.items():
        if f"{kind}:{name}.weight" in arrays:
            found[path] = arrays[f"{kind}:{name}.weight"].T
    return found


def config_of(case: dict) -> ModelConfig:
    return ModelConfig(
        pattern="E", vocab_size=4, hidden_size=16, n_routed_experts=EXPERTS, moe_intermediate_size=12,
        num_experts_per_tok=case["moe_router_topk"],
        moe_shared_expert_intermediate_size=case.get("moe_shared_expert_intermediate_size"),
        moe_latent_size=case.get("moe_latent_size"),
        routed_scaling_factor=case.get("moe_router_topk_scaling_factor", 1.0),
        n_group=case.get("moe_router_num_groups", 1), topk_group=case.get("moe_router_group_topk", 1),
    )  # fmt: skip


def test_four_cases_are_ours():
    assert [case["case"] for case in cases()] == [3, 5, 6, 9]


@pytest.mark.parametrize(
    ("case", "dispatch"),
    [
        pytest.param(case, dispatch, id=f"case{case['case']}-{dispatch}")
        for case, dispatch in zip(cases(), ["allgather", "alltoall", "alltoall", "allgather"], strict=True)
    ],
)
def test_layer_and_its_gradients_equal_megatron(case, dispatch):
    arrays, config = read(case), config_of(case)
    plan = make_plan(PlanConfig(dispatch=dispatch), config)
    graph, params, buffers = nnx.split(jax.eval_shape(lambda: MoE(config, nnx.Rngs(0))), nnx.Param, ...)
    params = fill(params, by_path(arrays, "w"))
    buffers = fill(buffers, {("router", "bias"): arrays["w:router.expert_bias"]})
    x_btd, gy_btd = (jnp.asarray(arrays[name].swapaxes(0, 1)) for name in ("x", "gy"))
    rows, length, _ = x_btd.shape
    coefficients = (case["moe_aux_loss_coeff"] / rows, case.get("moe_z_loss_coeff", 0.0) / (rows * length))

    def total(params, x_btd):
        y_btd, stats = nnx.merge(graph, params, buffers)(x_btd, documents(jnp.ones((rows, length))), plan)
        losses = [weight * loss for weight, loss in zip(coefficients, stats.losses, strict=True)]
        return jnp.sum(y_btd * gy_btd) + sum(losses), (y_btd, stats)

    (_, (y_btd, stats)), (grads, grad_x_btd) = jax.jit(
        jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    )(params, x_btd)  # fmt: skip
    np.testing.assert_allclose(y_btd, arrays["y"].swapaxes(0, 1), rtol=1e-5, atol=1e-5)
    close(grad_x_btd, arrays["gx"].swapaxes(0, 1), "x")
    expected = by_path(arrays, "g")
    found = dict(nnx.to_flat_state(grads))
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        close(variable.get_value(), expected[path], path)
    if "logged_seq_load_balancing_loss" in arrays:
        logged = [arrays[f"logged_{name}"][0] for name in ("seq_load_balancing_loss", "z_loss")]
        np.testing.assert_allclose([stats.losses.balance / rows, stats.losses.z / (rows * length)], logged, rtol=1e-5)


def close(actual, expected, name) -> None:
    error = np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 1e-5, f"{name}: {error}"
