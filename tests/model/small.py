"""A small model with every layer type, and random weights that leave no parameter at a special value."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.model.lm import LanguageModel, build
from orogen.parallel.plan import Plan, make_plan


def config(**changes: Any) -> ModelConfig:
    sizes = {
        "pattern": "Mm*-E/*E", "mtp_depths": 2, "vocab_size": 23, "hidden_size": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 5, "intermediate_size": 14, "mamba_num_heads": 6, "mamba_head_dim": 3,
        "n_groups": 2, "mamba_intermediate_size": 10, "time_step_rank": 3, "ssm_state_size": 7, "conv_kernel": 4,
        "chunk_size": 4, "n_routed_experts": 6, "num_experts_per_tok": 3,
        "moe_intermediate_size": 8, "moe_latent_size": 9, "mtp_loss_scale": 0.4,
        "moe_shared_expert_intermediate_size": 10, "router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.003,
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def one_device(model: ModelConfig, **changes: Any) -> Plan:
    return make_plan(PlanConfig(**changes), model)


@functools.cache
def model_parts(model: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The graph, parameters and buffers, drawn by numpy."""
    built = build(model)
    rng = np.random.default_rng(seed)
    return built.graph, randomised(built.params, rng), randomised(built.buffers, rng)


def randomised(state: nnx.State, rng: np.random.Generator) -> nnx.State:
    """Matrices of about unit gain, vectors about one (norms, D) or zero (biases), time steps from 0.05 to 1."""

    def draw(path, variable):
        shape, name = variable.get_value().shape, path[-1]
        noise = rng.normal(size=shape)
        if name == "A_log":
            return np.log(rng.uniform(1, 4, shape))
        if name == "dt_bias":
            return np.log(np.expm1(np.exp(rng.uniform(np.log(0.05), 0, shape))))
        if str(name).endswith("bias"):  # of convolutions, projections and routers
            return 0.1 * noise
        axes = len(variable.get_metadata()["axes"])
        return 1 + 0.3 * noise if axes == 1 else noise / shape[-2] ** 0.5

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(p, v.replace(draw(p, v).astype(np.float32))) for p, v in flat])


def merged(model: ModelConfig, *, embedding_vd: jax.Array | None = None) -> LanguageModel:
    """The model; `embedding_vd` replaces its embedding."""
    graph, *states = model_parts(model)
    params, buffers = jax.tree.map(jnp.asarray, states)
    if embedding_vd is not None:
        flat = dict(nnx.to_flat_state(params))
        flat["embedding", "weight"] = flat["embedding", "weight"].replace(embedding_vd)
        params = nnx.from_flat_state(list(flat.items()))
    return nnx.merge(graph, params, buffers)


class Witness:
    """A model that keeps its final-normed hidden states, those of every depth."""

    def __init__(self, model: LanguageModel):
        self.model, self.seen = model, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def norm(self, *arguments):
        h_btd = self.model.norm(*arguments)
        self.seen.append(h_btd)
        return h_btd

    def deeper(self, *arguments):
        found = self.model.deeper(*arguments)
        self.seen += [h_btd for h_btd, _ in found]
        return found


def relative_error(found: Any, expected: Any) -> float:
    """The worst leaf's norm of the difference beside the norm of the expected leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))  # noqa: E731
    return max(norm(np.asarray(a, np.float64) - b) / max(norm(b), 1e-30) for a, b in pairs)
