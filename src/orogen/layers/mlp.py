"""The dense MLP, and the activations that experts share. Letters: b batch, t time, d model, f hidden."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.kernels.recompute import from_inputs
from orogen.layers.documents import Documents
from orogen.layers.linear import add_bias, linear, linears
from orogen.layers.parameter import normal, parameter
from orogen.layers.probe import measuring, row_squares
from orogen.parallel.plan import Plan

# The slope of the sigmoid in gpt-oss's clamped SwiGLU.
SWIGLU_ALPHA = 1.702


def squared_relu(x: Array) -> Array:
    """relu(x)², the activation of every Nemotron MLP and expert (arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "relu2": squared_relu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def activate(up: Array, gate: Array | None, *, name: str, limit: float | None = None) -> Array:
    """act(up), or with a gate act(gate) · up (arXiv:2002.05202).

    With a limit c it is (clip(up, ±c) + 1) · g · sigmoid(1.702 g) with g = min(gate, c), as in gpt-oss: the gate is
    clamped from above only.
    """

    def act(up: Array, gate: Array | None) -> Array:
        if gate is None:
            return ACTIVATIONS[name](up)
        if limit is None:
            return ACTIVATIONS[name](gate) * up
        gate = jnp.minimum(gate, limit)
        return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate)

    return from_inputs(act)(up, gate)


class MLP(nnx.Module):
    """down(activate(up x, gate x)); hidden columns and their biases are sharded over `mlp`.

    prefix: of the checkpoint names of its intermediates, which remat policies use: `shared_` for a shared expert.
    """

    def __init__(self, config: ModelConfig, hidden: int, *, bias: bool, rngs: nnx.Rngs, prefix: str = ""):
        size, std = config.hidden_size, config.init_std
        self.activation, self.limit, self.prefix = config.mlp_hidden_act, config.swiglu_limit, prefix
        self.kind = "shared" if prefix else "dense"
        self.up = normal(rngs, (size, hidden), ("embed", "mlp"), std=std)
        self.down = normal(rngs, (hidden, size), ("mlp", "embed"), std=config.output_init_std)
        self.gate = normal(rngs, (size, hidden), ("embed", "mlp"), std=std) if config.mlp_gated else None
        self.up_bias = parameter(jnp.zeros(hidden), ("mlp",)) if bias else None
        self.gate_bias = parameter(jnp.zeros(hidden), ("mlp",)) if bias and config.mlp_gated else None
        self.down_bias = parameter(jnp.zeros(size), ("norm",)) if bias else None

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Any = None) -> tuple[Array, Any]:
        """y (b, t, d), by the signature of a mixer; it keeps nothing, or the statistics that a probe requests."""
        if not measuring(given):
            return self.transform(x_btd, plan), None
        hidden_btf = self.hidden(x_btd, plan)
        return self.project(hidden_btf, plan), {"mlp": row_squares(hidden_btf, docs, plan, "mlp")}

    def start(self, allocator: Any, dtype: Any) -> None:
        """None: the layer treats each token by itself, so there is nothing to cache."""

    def cache_axes(self, allocator: Any) -> None:
        """None, as in `start`."""

    def transform(self, x_btd: Array, plan: Plan) -> Array:
        """y (b, t, d)."""
        return self.project(self.hidden(x_btd, plan), plan)

    def hidden(self, x_btd: Array, plan: Plan) -> Array:
        """The hidden units (b, t, f) of this rank, for the whole context rank."""
        weights = [w for w in (self.up, self.gate) if w is not None]
        biases = (self.up_bias, self.gate_bias)[: len(weights)]
        with jax.named_scope("up"):
            h_btd = plan.enter(x_btd)
            up_btf, *gates_btf = (
                checkpoint_name(add_bias(y_btf, bias), f"{self.prefix}up")
                for y_btf, bias in zip(linears(h_btd, weights, plan, f"{self.kind}_up"), biases, strict=True)
            )
        with jax.named_scope("activation"):
            gate_btf = gates_btf[0] if gates_btf else None
            hidden_btf = activate(up_btf, gate_btf, name=self.activation, limit=self.limit)
            return checkpoint_name(hidden_btf, f"{self.prefix}activation")

    def project(self, hidden_btf: Array, plan: Plan) -> Array:
        """y (b, t, d) from the hidden units."""
        with jax.named_scope("down"):
            # The ranks' partial products are summed first, so that the bias is added once.
            return add_bias(plan.leave(linear(hidden_btf, self.down, plan, f"{self.kind}_down")), self.down_bias)


def dense_mlp(config: ModelConfig, rngs: nnx.Rngs) -> MLP:
    """The mixer of a dense MLP layer (`-`)."""
    return MLP(config, config.intermediate_size, bias=config.mlp_bias, rngs=rngs)
