"""A plan of eight devices that several tests share."""

import jax.numpy as jnp
from flax import nnx
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.parallel.plan import Plan, make_plan

# Eight devices, data 2 x tensor 4, all of them experts; two key heads and two groups split tensor in two.
FOLDED = {"data": 2, "tensor": 4, "expert": 8}


def plan_of(sizes: dict | None = None, model: dict | None = None, *, abstract: bool = True, **choices) -> Plan:
    """The plan of these sizes, FOLDED by default, of the small hybrid with changes `model`."""
    return make_plan(
        PlanConfig(**(FOLDED if sizes is None else sizes), **choices), hybrid(**(model or {})), abstract=abstract
    )


def tree() -> dict[str, nnx.Variable]:
    """Parameters of each kind: a matrix, one of stacked layers, experts and a vector."""
    return {
        "up": nnx.Param(jnp.arange(48.0 * 8).reshape(48, 8), axes=("embed", "mlp")),
        "stacked": nnx.Param(jnp.zeros((3, 48, 8)), axes=("embed", "mlp")),
        "experts": nnx.Param(jnp.zeros((24, 24, 20)), axes=("expert", "expert_embed", "expert_mlp")),
        "norm": nnx.Param(jnp.zeros(48), axes=("norm",)),
    }
