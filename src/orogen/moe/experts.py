"""The routed experts' weights. Letters: e experts, r rows sorted by expert, w expert width, f hidden."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.kernels.grouped_matmul import grouped_matmul
from orogen.layers.mlp import squared_relu
from orogen.layers.parameter import normal
from orogen.parallel.plan import Plan


class Experts(nnx.Module):
    """down_e(relu(up_e x)²) for the rows of each expert e."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts, width, hidden = config.n_routed_experts, config.expert_width, config.moe_intermediate_size
        self.up = normal(rngs, (experts, width, hidden), ("expert", "expert_embed", "expert_mlp"), std=config.init_std)
        self.down = normal(
            rngs, (experts, hidden, width), ("expert", "expert_mlp", "expert_embed"), std=config.output_init_std
        )

    def __call__(self, rows_rw: Array, group_sizes: Array | int, plan: Plan) -> Array:
        """(r, w). group_sizes: rows of each expert of this rank, one int if all have as many."""
        multiply = lambda x, w: grouped_matmul(x, w, group_sizes, implementation=plan.config.grouped_matmul)  # noqa: E731
        hidden_rf = squared_relu(multiply(rows_rw, plan.weight(self.up)))
        return multiply(hidden_rf, plan.weight(self.down)).astype(jnp.result_type(rows_rw))
