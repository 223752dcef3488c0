"""The mixture of experts."""

from orogen.config.model import ModelConfig
from orogen.cost.collectives import block
from orogen.cost.dispatches import dispatch_of, expert_rows
from orogen.cost.kind import LayerCosts
from orogen.cost.kinds.mlp import matrices, mlp_operations, mlp_weights
from orogen.cost.ledger import FLOAT32, INT32, Ledger
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory, product
from orogen.cost.weight import Weight, vector


def _flops(config: ModelConfig, _: int) -> float:
    size, width, latent = config.hidden_size, config.expert_width, config.moe_latent_size or 0
    routed = 2 * matrices(config) * width * config.moe_intermediate_size * config.num_experts_per_tok
    shared = 2 * matrices(config) * size * (config.moe_shared_expert_intermediate_size or 0)
    gates = 2 * size * (config.n_routed_experts + config.moe_shared_expert_gate)
    return gates + routed + shared + 4 * size * latent


def _weights(model: ModelConfig) -> list[Weight]:
    size, experts, width = model.hidden_size, model.n_routed_experts, model.expert_width
    hidden, inward = model.moe_intermediate_size, 1 + model.mlp_gated
    found = [Weight((experts, width, hidden), ("expert", "expert_embed", "expert_mlp"))] * inward
    found.append(Weight((experts, hidden, width), ("expert", "expert_mlp", "expert_embed")))
    if model.routed_expert_bias:
        found += [Weight((experts, hidden), ("expert", "expert_mlp"), float32=True)] * inward
        found.append(Weight((experts, width), ("expert", "norm"), float32=True))
    found.append(Weight((size, experts), ("embed", None), float32=True))  # the router
    if model.router_bias:
        found.append(vector(experts, None))
    if latent := model.moe_latent_size:
        found += [Weight((size, latent), ("embed", None)), Weight((latent, size), (None, "embed"))]
        found += [vector(latent, None), vector(size, "norm")] if model.shared_expert_bias else []
    if shared := model.moe_shared_expert_intermediate_size:
        found += mlp_weights(model, shared, bias=model.shared_expert_bias)
    return [*found, Weight((size, 1), ("embed", None))] if model.moe_shared_expert_gate else found


def _kept(here: Local) -> dict[str, float]:
    model, plan = here.model, here.plan
    width, gates, k = model.expert_width * here.itemsize, 1 + model.mlp_gated, model.num_experts_per_tok
    _, room, returned = expert_rows(here)
    hidden = room * (model.moe_intermediate_size // plan.expert_tensor) * here.itemsize
    held = {
        "router": here.routed * model.n_routed_experts * FLOAT32,
        "routing": 3 * here.routed * k * INT32 + here.rows * model.n_routed_experts * FLOAT32,
        "chosen": here.routed * k * 2 * INT32,
        "rows": room * width,
        "expert_up": hidden * gates,
        "expert_activation": hidden,
        "expert_out": returned * width,
    }
    if model.moe_latent_size:
        held |= {"combined": here.routed * width, "latent": here.routed * width}
    if shared := model.moe_shared_expert_intermediate_size:
        inner = here.tokens * here.split(shared) * here.itemsize
        held |= {"shared_up": inner * gates, "shared_activation": inner}
    if model.moe_shared_expert_gate:
        held["shared_out"] = here.own * (model.hidden_size + 1) * here.itemsize
    return held


def _autodiff(here: Local, named: dict[str, float]) -> dict[str, float]:
    """Scores, their sigmoids and softmaxes instead of the logits."""
    model = here.model
    scores = here.routed * (3 * model.n_routed_experts + 3 * model.num_experts_per_tok) * FLOAT32
    return {name: size for name, size in named.items() if name not in ("router", "latent", "chosen")} | {
        "unnamed": scores
    }


def _collectives(ledger: Ledger) -> None:
    plan, model = ledger.plan, ledger.model
    dispatch_of(plan).collectives(ledger)
    if plan.stream == "whole":  # each rank routes its own tokens
        ledger.gather("combine", ("tensor",), ledger.stream / plan.tensor, needed=False)
    if model.moe_shared_expert_intermediate_size:
        block(ledger, "shared expert", needed=model.moe_shared_expert_gate, name="shared_out")
    experts, sequences = model.n_routed_experts, ledger.work.rows
    sequence, everywhere = ("context", "tensor"), ("data", "context", "tensor")
    statistic = lambda axes, numbers, needed=False, name="": ledger.add(  # noqa: E731
        "router statistics", "forward", "all-reduce", axes, numbers * FLOAT32, needed=needed, name=name
    )
    # For the balance loss: probabilities and counts per expert, tokens per sequence. Gradients of sums send nothing.
    if model.router_balance == "global":
        statistic(everywhere, experts)
        statistic(everywhere, experts)
    else:
        statistic(sequence, sequences * experts)
        statistic(sequence, sequences * experts, needed=True, name="routing")
        statistic(sequence, sequences, needed=True)
        statistic(("data",), 1)
    statistic(everywhere, 1)  # the z-loss


def _operations(here: Local) -> list[Operation]:
    model, plan, size = here.model, here.plan, here.itemsize
    rows, room, _ = expert_rows(here)
    width, hidden, gates = model.expert_width, model.moe_intermediate_size // plan.expert_tensor, 1 + model.mlp_gated
    local, n = model.n_routed_experts // plan.expert, here.routed
    scores = n * model.n_routed_experts * FLOAT32
    sent = (n + n * model.num_experts_per_tok) * width * size
    found = [
        product("router", n, model.hidden_size, model.n_routed_experts, size, makes="router"),
        memory("routing", 4 * scores, 4 * scores, makes="routing", kernels=10),
        memory("permute", sent, sent, makes="rows", kernels=2),
        _grouped("expert_up", (rows, width, gates * hidden), local, size, makes="expert_up"),
        memory(
            "expert_activation",
            (1 + gates) * room * hidden * size,
            (1 + 2 * gates) * room * hidden * size,
            makes="expert_activation",
        ),
        _grouped("expert_down", (rows, hidden, width), local, size, makes="expert_out"),
        memory("combine", sent, 2 * sent, makes="combined", kernels=2),
    ]
    if latent := model.moe_latent_size:
        found.append(product("latent_down", n, model.hidden_size, latent, size, makes="latent"))
        found.append(product("latent_up", n, latent, model.hidden_size, size, last=True))
    if shared := model.moe_shared_expert_intermediate_size:
        found += mlp_operations(here, shared, "shared_")
    return found


def _grouped(name: str, shape: tuple[float, float, float], groups: int, size: int, *, makes: str) -> Operation:
    """The products of `groups` experts, with m rows in all, and their gradients."""
    m, k, n = shape
    flops, moved = 2 * m * k * n, size * (m * k + groups * k * n + m * n)
    return Operation(name, "grouped", flops, moved, (2 * flops, 2 * moved), shape, makes, groups=groups)


COSTS = LayerCosts(
    flops=_flops,
    weights=_weights,
    kept=_kept,
    products=("router", "latent", "expert_activation", "shared_up", "chosen"),
    unread=("latent",),
    autodiff=_autodiff,
    collectives=_collectives,
    operations=_operations,
    kernels=("grouped_matmul",),
)
