"""One mixture-of-experts layer of toy width, compiled for a layout: the bytes that its program sends, and the count."""

from typing import Any

from mapping import NODE, Groups, Layout, Sent, groups_over, layer_traffic, sent, total

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.ledger import Workload
from orogen.parallel.legal import fold_plan
from orogen.parallel.plan import make_plan
from orogen.simulate.aot import compiled
from orogen.simulate.units import unit_of

TOKENS = 256  # of one device: the fewest that give each of 512 experts, 22 per token, a whole even share
FLOAT32 = 4  # XLA:CPU carries 16-bit collectives as float32
EXCHANGES = ("all-to-all", "all-gather", "reduce-scatter")


def toy(model: ModelConfig) -> ModelConfig:
    """One narrow layer with the same experts and routing, without a shared expert."""
    latent: dict[str, Any] = {"moe_latent_size": 16} if model.moe_latent_size else {}
    return ModelConfig(
        pattern="E",
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=64,
        n_routed_experts=model.n_routed_experts,
        num_experts_per_tok=model.num_experts_per_tok,
        router_score=model.router_score,
        mlp_gated=model.mlp_gated,
        mlp_hidden_act=model.mlp_hidden_act,
        **latent,
    )


def plan_of(layout: Layout) -> PlanConfig:
    """Orogen's plan for a layout. With one context rank, the unfolded layout, in which experts lie inside data and are
    split over tensor like dense layers, is a folded layout with expert_tensor."""
    if not layout.folded and (layout.context, layout.expert_tensor) != (1, layout.tensor):
        raise ValueError(f"{layout}; expected a folded one, or context 1 and expert_tensor equal to tensor")
    return PlanConfig(
        data=layout.data,
        context=layout.context,
        tensor=layout.tensor,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        dispatch="alltoall",
        capacity_factor=1.0,
    )


def compare(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    """The bytes that a device sends in the forward and backward pass of the toy layer, by link: counted and compiled.

    groups: for each operation of the program, the number of groups inside a node and of others.
    Raises AssertionError if the compiled sends differ from the counted ones.
    """
    narrow, config = toy(model), plan_of(layout)
    plan = make_plan(config, narrow)
    # Workload counts tokens before the sequence is split over tensor.
    work = Workload(rows=1, tokens=TOKENS * layout.tensor)
    table = compiled(unit_of("E", narrow, plan, work), plan)
    folding = fold_plan(config, narrow)
    found, groups = {}, {}
    for (operation, axes), traffic in table.items():
        if operation in EXCHANGES:
            members: Groups = groups_over(folding, axes)
            by_link = sent(members, traffic.bytes / (members.shape[1] - 1))
            found[f"{operation} over {' x '.join(axes)}"] = by_link
            inside = int((members // NODE == members[:, :1] // NODE).all(1).sum())
            groups[operation] = [inside, len(members) - inside]
    counted = total(layer_traffic(narrow, layout, TOKENS, capacity=1.0, itemsize=FLOAT32))
    seen = Sent(sum(s.in_node for s in found.values()), sum(s.between for s in found.values()))
    if seen != counted:
        raise AssertionError(f"{layout}: compiled {seen} is not the counted {counted}; program: {found}")
    return {"tokens": TOKENS, "counted": counted._asdict(), "compiled": seen._asdict(), "groups": groups}
