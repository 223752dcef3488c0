"""The dense MLP, and the tanh-gated one."""

from orogen.config.model import ModelConfig
from orogen.config.plan import FOR_GPU
from orogen.cost.collectives import block
from orogen.cost.kind import LayerCosts
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product
from orogen.cost.weight import Weight, vector


def _flops(config: ModelConfig, _: int) -> float:
    return 2 * matrices(config) * config.hidden_size * config.intermediate_size


def matrices(config: ModelConfig) -> int:
    """The number of matrices of an MLP or an expert."""
    return 3 if config.mlp_gated else 2


def _weights(model: ModelConfig) -> list[Weight]:
    return mlp_weights(model, model.intermediate_size, bias=model.mlp_bias)


def mlp_weights(model: ModelConfig, hidden: int, *, bias: bool) -> list[Weight]:
    """The matrices and biases of an MLP of `hidden` units."""
    size, inward = model.hidden_size, 1 + model.mlp_gated
    found = [Weight((size, hidden), ("embed", "mlp"))] * inward + [Weight((hidden, size), ("mlp", "embed"))]
    return [*found, *[vector(hidden, "mlp")] * inward, vector(size, "norm")] if bias else found


def _kept(here: Local) -> dict[str, float]:
    hidden = here.tokens * here.split(here.model.intermediate_size) * here.itemsize
    return {"up": hidden * (1 + here.model.mlp_gated), "activation": hidden}


def branch(here: Local) -> dict[str, float]:
    """What a tanh-gated layer multiplies by its gate."""
    return {"branch": here.own * here.model.hidden_size * here.itemsize}


def mlp_operations(here: Local, hidden: int | None = None, prefix: str = "") -> list[Operation]:
    """The products of an MLP and its activation. prefix: of their names."""
    model, n, size = here.model, here.tokens, here.itemsize
    width, gates = here.split(hidden or model.intermediate_size), 1 + model.mlp_gated
    inner = n * width * size
    return [
        product(f"{prefix}up", n, model.hidden_size, gates * width, size, makes=f"{prefix}up"),
        memory(f"{prefix}activation", (1 + gates) * inner, (1 + 2 * gates) * inner, makes=f"{prefix}activation"),
        product(f"{prefix}down", n, width, model.hidden_size, size, last=True),
    ]


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    products=("up",),
    collectives=block,
    operations=mlp_operations,
    kernels=tuple(FOR_GPU),
)
TANH_GATED = COSTS._replace(
    weights=lambda model: [*_weights(model), vector(1, "norm")],
    kept=lambda here: {**_kept(here), **branch(here)},
    products=("up", "branch"),
)
