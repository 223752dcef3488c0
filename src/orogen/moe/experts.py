"""The routed experts' weights. Letters: e experts, r rows sorted by expert, w expert width, f hidden."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.kernels.grouped_matmul import grouped_matmul
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.layers.adapter import Weight, base_of
from orogen.layers.linear import grouped, rows_of_experts
from orogen.layers.mlp import activate
from orogen.layers.parameter import normal, parameter
from orogen.parallel.plan import Plan


class Experts(nnx.Module):
    """down_e(activate(up_e x, gate_e x)) for the rows of each expert e, with biases if the config has them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        experts, width, hidden = config.n_routed_experts, config.expert_width, config.moe_intermediate_size
        inward, outward = ("expert", "expert_embed", "expert_mlp"), ("expert", "expert_mlp", "expert_embed")

        def matrix(inputs: int, outputs: int, axes: tuple[str, ...], std: float) -> nnx.Param:
            return normal(rngs, (experts, inputs, outputs), axes, std=std)

        def vector(size: int, axis: str) -> nnx.Param:
            """One vector per expert: like other vectors, it stays whole and in float32."""
            return parameter(jnp.zeros((experts, size)), ("expert", axis), float32=True)

        bias, gated = config.routed_expert_bias, config.mlp_gated
        self.activation, self.limit = config.mlp_hidden_act, config.swiglu_limit
        self.up = matrix(width, hidden, inward, config.init_std)
        self.down = matrix(hidden, width, outward, config.output_init_std)
        self.gate = matrix(width, hidden, inward, config.init_std) if gated else None
        self.up_bias = vector(hidden, "expert_mlp") if bias else None
        self.gate_bias = vector(hidden, "expert_mlp") if bias and gated else None
        self.down_bias = vector(width, "norm") if bias else None

    def __call__(
        self, rows_rw: Array, group_sizes: Array | RowGroups | int, plan: Plan, number_r: Array | None = None
    ) -> Array:
        """(r, w) in rows' dtype. group_sizes: rows per expert of this rank (an int if all have the same number), or the
        expert of each result. number_r: int32, required if the recipe rounds rows: the index in the global batch of
        each row's token, -1 for a row without one."""
        return self.with_hidden(rows_rw, group_sizes, plan, number_r)[0]

    def with_hidden(
        self, rows_rw: Array, group_sizes: Array | RowGroups | int, plan: Plan, number_r: Array | None = None
    ) -> tuple[Array, Array]:
        """The result (r, w), and this rank's hidden units (r, f), from which it is computed."""
        placed = None
        if number_r is not None:
            placed = rows_of_experts(number_r, group_sizes, plan, experts=len(base_of(self.up)[...]))

        def project(
            x_rw: Array, weight: Weight, bias: nnx.Param | None, *, counts: Array | bool = True,
            kind: str = "routed_up", call: int = 0,
        ) -> Array:  # fmt: skip
            y_rf = grouped(x_rw, weight, group_sizes, plan, kind, call=call, rows=placed)
            if bias is None:
                return y_rf
            # Each row's bias, as a product with ones: rows without an expert get none, and gradients sum in float32.
            bias_e1f = (bias[...] * counts)[:, None].astype(x_rw.dtype)
            ones_r1 = jnp.ones((len(x_rw), 1), x_rw.dtype)
            return y_rf + grouped_matmul(ones_r1, bias_e1f, group_sizes, implementation=plan.config.grouped_matmul)

        up_rf = checkpoint_name(project(rows_rw, self.up, self.up_bias), "expert_up")
        gate_rf = None
        if self.gate is not None:
            gate_rf = checkpoint_name(project(rows_rw, self.gate, self.gate_bias, call=1), "expert_up")
        hidden_rf = activate(up_rf, gate_rf, name=self.activation, limit=self.limit)
        hidden_rf = checkpoint_name(hidden_rf, "expert_activation")
        # Every rank that shares an expert's hidden units adds a partial sum, and only one of them adds the bias.
        counts = plan.index("expert_tensor") == 0
        return project(hidden_rf, self.down, self.down_bias, counts=counts, kind="routed_down"), hidden_rf
