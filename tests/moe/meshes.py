"""Runs an MoE layer on a plan, forward and backward, beside `orogen.moe.reference`.

Letters: b batch, t time, d model, s source ranks, n tokens of one of them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.documents import Documents
from orogen.moe.layer import MoE
from orogen.moe.reference import Options, Weights, balance_loss, mixture, z_loss
from orogen.parallel.axes import STREAM
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

BALANCE, Z = 0.3, 0.02  # weights of the router's losses in the scalar that is differentiated


class Result(NamedTuple):
    """Output, assignments by expert, assignments dropped and those without room in a buffer, sums of the router's
    losses, and the gradients of Σ y · gy + BALANCE · balance + Z · z: of the weights, and of x."""

    y_btd: np.ndarray
    load_e: np.ndarray
    dropped: int
    overflow: int
    losses: tuple[float, float]
    grads: Weights
    grad_x_btd: np.ndarray


class Inputs(NamedTuple):
    """What the layer reads, and the cotangent of its output."""

    x_btd: Array
    segments_bt: Array
    gy_btd: Array


def config(**changes: Any) -> ModelConfig:
    sizes = {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "routed_scaling_factor": 2.5,
        "moe_latent_size": 4, "moe_shared_expert_intermediate_size": 16,
    }  # fmt: skip
    return ModelConfig(pattern="E", vocab_size=8, hidden_size=20, **(sizes | changes))


def weights(model: ModelConfig, seed: int, *, bias: Any = None) -> Weights:
    """Random ones; `bias` replaces the random correction bias."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)  # noqa: E731
    d, e, w, f = model.hidden_size, model.n_routed_experts, model.expert_width, model.moe_intermediate_size
    latent, shared = model.moe_latent_size, model.moe_shared_expert_intermediate_size
    gated, biased = model.mlp_gated, model.mlp_bias
    vector = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    gate_de = 1.5 * draw(d, e)
    bias_e = jnp.asarray(0.1 * rng.normal(size=e) if bias is None else bias, jnp.float32)
    return Weights(
        gate_de=gate_de,
        bias_e=bias_e if model.router_correction_bias else None,
        up_ewf=draw(e, w, f), down_efw=draw(e, f, w),
        latent_down_dw=draw(d, latent) if latent else None, latent_up_wd=draw(latent, d) if latent else None,
        shared_up_df=draw(d, shared) if shared else None, shared_down_fd=draw(shared, d) if shared else None,
        gate_bias_e=vector(e) if model.router_bias else None, expert_gate_ewf=draw(e, w, f) if gated else None,
        up_bias_ef=vector(e, f) if biased else None, expert_gate_bias_ef=vector(e, f) if gated and biased else None,
        down_bias_ew=vector(e, w) if biased else None, shared_gate_df=draw(d, shared) if gated and shared else None,
        shared_scale_d1=draw(d, 1) if model.moe_shared_expert_gate else None,
    )  # fmt: skip


def inputs(model: ModelConfig, seed: int, *, rows: int, length: int) -> Inputs:
    """Random ones, about one token in six padding."""
    rng = np.random.default_rng(seed)
    x_btd, gy_btd = (jnp.asarray(rng.normal(size=(rows, length, model.hidden_size)), jnp.float32) for _ in range(2))
    return Inputs(x_btd, jnp.asarray(rng.random((rows, length)) > 1 / 6, jnp.int32), gy_btd)


PATHS = {
    ("router", "gate"): "gate_de", ("router", "bias"): "bias_e", ("experts", "up"): "up_ewf",
    ("experts", "down"): "down_efw", ("latent_down",): "latent_down_dw", ("latent_up",): "latent_up_wd",
    ("shared", "up"): "shared_up_df", ("shared", "down"): "shared_down_fd",
    ("router", "gate_bias"): "gate_bias_e", ("experts", "gate"): "expert_gate_ewf",
    ("experts", "up_bias"): "up_bias_ef", ("experts", "gate_bias"): "expert_gate_bias_ef",
    ("experts", "down_bias"): "down_bias_ew", ("shared", "gate"): "shared_gate_df", ("shared_gate",): "shared_scale_d1",
}  # fmt: skip


def layer_result(
    model: ModelConfig, plan: PlanConfig, given: Weights, data: Inputs, *, sources: tuple[int, int, int] = (1, 1, 1)
) -> Result:
    """The layer, inside the plan's shard_map. sources: the ranks that one device stands for."""
    step, states = _layer_step(model, plan, sources)
    filled = [
        nnx.from_flat_state([(p, v.replace(getattr(given, PATHS[p]))) for p, v in nnx.to_flat_state(state)])
        for state in states
    ]
    y_btd, load_e, dropped, overflow, losses, grads, grad_x_btd = jax.device_get(step(*filled, *data))
    by_name = {PATHS[path]: variable.get_value() for path, variable in nnx.to_flat_state(grads)}
    none = {name: None for name in Weights._fields if name not in by_name}
    return Result(y_btd, load_e, int(dropped), int(overflow), losses, Weights(**by_name, **none), grad_x_btd)


@functools.cache
def _layer_step(model: ModelConfig, plan_config: PlanConfig, sources: tuple[int, int, int]):
    """The jitted step, and the layer's parameters and buffers as abstract arrays."""
    plan = dataclasses.replace(make_plan(plan_config, model), sources=sources)
    graph, params, buffers = nnx.split(jax.eval_shape(lambda: MoE(model, nnx.Rngs(0))), nnx.Param, ...)
    tokens, whole = plan.spec(*STREAM, None), plan.spec()

    def device(params, buffers, x_btd, segments_bt, gy_btd):
        def total(params, x_btd):
            y_btd, stats = nnx.merge(graph, params, buffers)(x_btd, Documents(segments_bt, segments_bt), plan)
            losses = plan.total((stats.losses.balance, stats.losses.z))
            value = plan.total(jnp.sum(y_btd * gy_btd)) + BALANCE * losses[0] + Z * losses[1]
            return value, (y_btd, plan.total(stats.load), plan.total(stats.dropped), plan.total(stats.overflow), losses)

        (_, outputs), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x_btd)
        return *outputs, *grads

    specs = plan.specs(params)
    step = plan.run(
        device,
        inputs=(specs, plan.specs(buffers), tokens, plan.spec("batch", "context"), tokens),
        outputs=(tokens, whole, whole, whole, whole, specs, tokens),
    )
    return jax.jit(step), (params, buffers)


def reference_result(
    model: ModelConfig, given: Weights, data: Inputs, *, sources: tuple[int, int], capacity: int | None,
    policy: str = "position",
) -> Result:  # fmt: skip
    """The same by `orogen.moe.reference`, where each of `sources` (rows, columns) ranks counts its own capacity."""
    options = Options(
        k=model.num_experts_per_tok, n_group=model.n_group, topk_group=model.topk_group,
        normalise=model.norm_topk_prob, scaling=model.routed_scaling_factor, capacity=capacity,
        score=model.router_score, clamp=model.swiglu_limit, heaviest=policy == "probs",
    )  # fmt: skip
    (_, (y, load, dropped, losses)), (grads, grad_x) = jax.device_get(_reference(given, data, options, sources))
    return Result(y, load, int(dropped), 0, losses, grads, grad_x)


@functools.partial(jax.jit, static_argnames=("options", "sources"))
def _reference(given: Weights, data: Inputs, options: Options, sources: tuple[int, int]):
    b, t, _ = data.x_btd.shape
    rows, columns = b // sources[0], t // sources[1]
    token_bt = np.arange(b * t).reshape(b, t)
    tokens_sn = np.stack([
        token_bt[r : r + rows, c : c + columns].reshape(-1) for r in range(0, b, rows) for c in range(0, t, columns)
    ])  # fmt: skip
    valid_bt = data.segments_bt != 0

    def total(given, x_btd):
        x_snd, valid_sn = x_btd.reshape(b * t, -1)[tokens_sn], valid_bt.reshape(-1)[tokens_sn]
        answers = jax.vmap(lambda x_nd, valid_n: mixture(x_nd, valid_n, given, options))(x_snd, valid_sn)
        y_btd = answers.y_nd.reshape(b * t, -1)[np.argsort(tokens_sn.reshape(-1))].reshape(x_btd.shape)
        balance = jax.vmap(lambda x_td, valid_t: balance_loss(x_td, valid_t, given, options))
        losses = balance(x_btd, valid_bt).sum(), z_loss(x_btd.reshape(b * t, -1), valid_bt.reshape(-1), given)
        value = jnp.sum(y_btd * data.gy_btd) + BALANCE * losses[0] + Z * losses[1]
        return value, (y_btd, answers.load_e.sum(0), answers.dropped.sum(), losses)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(given, data.x_btd)


def assert_equal(found: Result, expected: Result) -> None:
    """Equal counts; outputs within 1e-5 of their largest entry, gradients within 1e-5 of their norm."""
    np.testing.assert_array_equal(found.load_e, expected.load_e)
    assert found.dropped == expected.dropped
    np.testing.assert_allclose(found.y_btd, expected.y_btd, rtol=0, atol=1e-5 * np.abs(expected.y_btd).max())
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert_close("x", found.grad_x_btd, expected.grad_x_btd)
    for name, a, b in zip(Weights._fields, found.grads, expected.grads, strict=True):
        if name != "bias_e" and b is not None:
            assert_close(name, a, b)


def assert_close(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    error = np.linalg.norm(found.astype(np.float64) - expected)
    assert error <= 1e-5 * np.linalg.norm(expected), f"{name}: {error} beside {np.linalg.norm(expected)}"
