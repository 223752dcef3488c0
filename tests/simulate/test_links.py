"""Where a group's ranks are, and what its collectives take: by hand, for nodes of eight devices."""

import dataclasses

import pytest

from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.cost.ledger import OUTER, Collective, Ledger, Workload
from orogen.simulate.hardware import KINDS, PROGRAMS, Shares
from orogen.simulate.links import Links, links_of

MODEL = load(["gin_configs/models/mixtral_8x22b.gin"])[0].model
PLAIN = Shares(node=1.0, node_few=0.0, network=1.0, node_latency=0.0, network_latency=0.0, gathers=2.0)
H100 = dataclasses.replace(KINDS["h100"], shares=PLAIN)


def links(software="megatron", **plan: int) -> Links:
    sizes = PlanConfig(**plan)
    return links_of(H100, PROGRAMS[software], Ledger(OUTER, sizes, MODEL, Workload(1, 8)))


def test_folded_experts_stay_in_a_node_where_others_leave_it():
    """Tensor 2 x context 2 x data 2 on a node: eight experts are its eight devices. Without folding, expert ranks are
    data ranks, four devices apart (arXiv:2504.14960, figure 3)."""
    folded = links(tensor=2, context=2, data=4, expert=8)
    assert folded.group(("expert",)) == (8, 8)
    assert folded.group(("tensor",)) == (2, 2)
    assert folded.group(("context",)) == (2, 2)
    assert folded.group(("data",)) == (4, 2)
    apart = links(tensor=2, context=2, data=4, expert=4, expert_tensor=4)
    assert apart.group(("expert",)) == (4, 2) and apart.group(("expert_tensor",)) == (4, 4)


def test_stages_are_in_other_nodes():
    assert links(tensor=8, stage=4, data=2).group(("stage",)) == (4, 1)
    assert links(tensor=2, stage=4).group(("stage",)) == (4, 4)
    assert links(tensor=2, stage=4, data=2).group(("data", "tensor")) == (4, 4)


def seconds(found: Links, operation: str, axes: tuple[str, ...], size: float, part: str = "sequence"):
    return found.seconds(Collective(part, "forward", operation, axes, 1, size))


def test_a_collective_in_a_node_is_bound_by_its_links():
    assert seconds(links(tensor=8), "all-gather", ("tensor",), 450e9) == (1.0, "node")


def test_gathers_over_nodes_use_all_adapters_of_the_group_unless_they_are_many_and_small():
    """16 data ranks on two nodes: 8 of the 15 pieces that a rank receives come from the other node."""
    found = links(data=16)
    time, link = seconds(found, "all-gather", ("data",), 15.0 * 50e9, "masters")
    assert (time, link) == (pytest.approx(max(8 / 8, 15 * 50 / 450)), "network")
    assert seconds(found, "all-gather", ("data",), 15.0 * 50e9, "weights")[0] == pytest.approx(2 * 8)


def test_an_exchange_over_nodes_sends_each_ranks_share_over_its_own_adapter():
    time, _ = seconds(links(data=16, expert=8, expert_tensor=1), "all-to-all", ("data",), 15 * 50e9)
    assert time == pytest.approx(8)


def test_a_token_is_sent_once_to_a_node_that_has_several_of_its_experts():
    """Two of eight experts on two nodes: 3/2 nodes are reached on average, so 3/4 of a node per expert."""
    once = dataclasses.replace(PROGRAMS["megatron"], once_per_node=1.0)
    plan = PlanConfig(data=16, expert=16)
    model = dataclasses.replace(MODEL, n_routed_experts=16)
    often, rarely = (
        links_of(H100, software, Ledger(OUTER, plan, model, Workload(1, 8))).seconds(
            Collective("dispatch", "forward", "all-to-all", ("expert",), 1, 15 * 50e9)
        )[0]
        for software in (PROGRAMS["megatron"], once)
    )
    assert rarely / often == pytest.approx(3 / 4)
