"""The mixture of experts against the MoE blocks of transformers, with random weights: outputs and all gradients.

Letters: b batch, t time, d model, e experts, f hidden. torch's linear maps are (out, in).
"""

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

pytestmark = pytest.mark.peer
D, E, F = 20, 8, 12
SWIGLU: dict = {"mlp_gated": True, "mlp_hidden_act": "silu", "router_correction_bias": False}


def mixtral():
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    peer = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(peer), {**SWIGLU, "router_score": "softmax_topk", "num_experts_per_tok": 2}, fused


def qwen2():
    from transformers.models.qwen2_moe import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    peer = Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=F, shared_expert_intermediate_size=18, num_experts=E,
        num_experts_per_tok=3, norm_topk_prob=False,
    )  # fmt: skip
    ours = {"router_score": "softmax", "norm_topk_prob": False, "num_experts_per_tok": 3}
    shared = {"moe_shared_expert_intermediate_size": 18, "moe_shared_expert_gate": True}
    return Qwen2MoeSparseMoeBlock(peer), {**SWIGLU, **ours, **shared}, fused


def qwen3():
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    peer = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=3, norm_topk_prob=True
    )
    return Qwen3MoeSparseMoeBlock(peer), {**SWIGLU, "router_score": "softmax", "num_experts_per_tok": 3}, fused


def gpt_oss():
    from transformers.models.gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    peer = GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=3)
    limit = 1.5  # of 7 that weights of this size do not reach
    block = GptOssMLP(peer)
    block.experts.limit = limit
    ours = {"router_score": "softmax_topk", "router_bias": True, "mlp_bias": True, "swiglu_limit": limit}
    return block, {**SWIGLU, **ours, "num_experts_per_tok": 3}, interleaved


def deepseek():
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    groups = {"num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    peer = DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, n_shared_experts=2, norm_topk_prob=True, **groups
    )
    shared = {"router_correction_bias": True, "moe_shared_expert_intermediate_size": 2 * F}
    return DeepseekV3MoE(peer), {**SWIGLU, **groups, **shared}, fused


def fused(tensors: dict) -> dict:
    """Our paths of a block whose experts hold gate and up one after the other, as (e, 2 f, d)."""
    gate_up = tensors["experts.gate_up_proj"].swapaxes(1, 2)
    found = {
        ("router", "gate"): tensors["gate.weight"].T,
        ("experts", "gate"): gate_up[..., :F],
        ("experts", "up"): gate_up[..., F:],
        ("experts", "down"): tensors["experts.down_proj"].swapaxes(1, 2),
    }
    for name in ("shared_expert", "shared_experts"):
        for matrix in ("up", "down", "gate"):
            if f"{name}.{matrix}_proj.weight" in tensors:
                found["shared", matrix] = tensors[f"{name}.{matrix}_proj.weight"].T
    if "shared_expert_gate.weight" in tensors:
        found["shared_gate",] = tensors["shared_expert_gate.weight"].T
    return found


def interleaved(tensors: dict) -> dict:
    """Our paths of gpt-oss's block: gate and up take turns on the output axis of (e, d, 2 f)."""
    matrix, bias = tensors["experts.gate_up_proj"], tensors["experts.gate_up_proj_bias"]
    return {
        ("router", "gate"): tensors["router.weight"].T,
        ("router", "gate_bias"): tensors["router.bias"],
        ("experts", "gate"): matrix[..., ::2],
        ("experts", "up"): matrix[..., 1::2],
        ("experts", "gate_bias"): bias[..., ::2],
        ("experts", "up_bias"): bias[..., 1::2],
        ("experts", "down"): tensors["experts.down_proj"],
        ("experts", "down_bias"): tensors["experts.down_proj_bias"],
    }


@pytest.mark.parametrize("dispatch", ["allgather", "alltoall"])
@pytest.mark.parametrize("family", [mixtral, qwen2, qwen3, gpt_oss, deepseek])
def test_layer_and_its_gradients_equal_transformers(family, dispatch):
    import torch

    block, ours, paths = family()
    rng = np.random.default_rng(0)
    draw = lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(draw(*parameter.shape) / 4)
        for buffer in block.buffers():
            buffer.copy_(draw(*buffer.shape) / 10)
    x, gy = draw(3, 17, D).requires_grad_(), draw(3, 17, D)
    y = block(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * gy).sum().backward()
    values = paths({name: p.detach().numpy() for name, p in block.named_parameters()})
    expected = paths({name: p.grad.numpy() for name, p in block.named_parameters()})
    biases = dict(zip([("router", "bias")], (b.numpy() for b in block.buffers()), strict=False))

    model = ModelConfig(
        pattern="E", vocab_size=4, hidden_size=D, n_routed_experts=E, moe_intermediate_size=F, **ours
    )  # fmt: skip
    plan = make_plan(PlanConfig(dispatch=dispatch), model)
    graph, params, buffers = nnx.split(jax.eval_shape(lambda: MoE(model, nnx.Rngs(0))), nnx.Param, ...)
    params, buffers = fill(params, values), fill(buffers, biases)

    def total(params, x_btd):
        y_btd, _ = nnx.merge(graph, params, buffers)(x_btd, documents(jnp.ones((3, 17))), plan)
        return jnp.sum(y_btd * gy.numpy()), y_btd

    x_btd = jnp.asarray(x.detach().numpy())
    (_, y_btd), (grads, grad_x_btd) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x_btd)
    close("y", y_btd, y.detach().numpy())
    close("x", grad_x_btd, x.grad.numpy())
    found = dict(nnx.to_flat_state(grads))
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        close(path, variable.get_value(), expected[path])


def close(name, found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected), err_msg=str(name))
