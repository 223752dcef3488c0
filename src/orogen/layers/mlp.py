"""The dense MLP. Letters: b batch, t time, d model, f hidden."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.layers.linear import linear
from orogen.layers.parameter import normal
from orogen.parallel.plan import Plan


def squared_relu(x: Array) -> Array:
    """relu(x)², the activation of every Nemotron MLP and expert (arXiv:2109.08668)."""
    return jnp.square(jax.nn.relu(x))


class MLP(nnx.Module):
    """down(relu(up x)²), without gate or bias; hidden columns are split over `mlp`."""

    def __init__(self, size: int, hidden: int, *, std: float, out_std: float, rngs: nnx.Rngs):
        self.up = normal(rngs, (size, hidden), ("embed", "mlp"), std=std)
        self.down = normal(rngs, (hidden, size), ("mlp", "embed"), std=out_std)

    def __call__(self, x_btd: Array, plan: Plan) -> Array:
        hidden_btf = squared_relu(linear(plan.gather(x_btd, "sequence"), plan.weight(self.up)))
        return plan.scatter(linear(hidden_btf, plan.weight(self.down)), "sequence")
