"""How long a collective takes: which of its ranks share a node, and what each link carries."""

import math
from collections.abc import Mapping

from orogen.config.plan import PlanConfig
from orogen.cost.ledger import Collective, Ledger
from orogen.simulate.hardware import Hardware, Software

# What a collective is for, by the part of a layer that the ledger names; others are for `tensor`.
KINDS = {
    "dispatch": "expert", "combine": "expert", "weights": "data", "gradients": "data", "masters": "data",
    "ring": "context", "keys": "context", "heads": "context", "states": "context", "halo": "context",
    "targets": "context", "stream": "stage",
}  # fmt: skip
# What `PlanConfig.shift` sends.
SHIFTED = ("ring", "states", "halo", "targets", "counts")
KIND_NAMES = ("tensor", "context", "expert", "data", "stage")


class Links:
    """The groups of a plan's axes on nodes of a kind of hardware. Devices are numbered as the plan's mesh is: stages
    outermost, then data, context and tensor; experts' axes over the same devices (parallel/fold.py)."""

    def __init__(self, hardware: Hardware, software: Software, plan: PlanConfig, sizes: Mapping[str, int]):
        self.hardware, self.shares, self.software = hardware, hardware.shares, software
        self.plan, self.sizes = plan, sizes
        self.starts = _starts(plan, sizes)

    def group(self, axes: tuple[str, ...]) -> tuple[int, int]:
        """The ranks of a group over `axes`, and how many of them share a node."""
        ranks = math.prod(self.sizes[axis] for axis in axes)
        near, node = 1, self.hardware.node_size
        for axis in axes:
            near *= min(self.sizes[axis], max(1, node // self.starts[axis]))
        return ranks, min(near, ranks, node)

    def seconds(self, record: Collective) -> tuple[float, str]:
        """The time of a record's collectives, and the link that bounds them: `node` or `network`."""
        ranks, near = self.group(record.axes)
        if self._shifted(record):
            record = record._replace(bytes=record.bytes / (ranks - 1))
        nodes = ranks / near
        shares, latency = self.shares, self.shares.node_latency
        inside = self.hardware.node_bandwidth * shares.node * (1 - shares.node_few * 2 / max(near, 2))
        if nodes == 1:
            return record.bytes / inside + record.count * latency * math.log2(2 * ranks) / 2, "node"
        outside = self.hardware.network_bandwidth * shares.network * max(0.1, 1 - shares.congestion * math.log2(nodes))
        latency = shares.network_latency
        others = (ranks - near) / (ranks - 1)
        if record.operation in ("all-gather", "reduce-scatter", "all-reduce"):
            # Rings run on as many rails as the group has devices in a node, so that each byte enters a node once. Many
            # small gathers, one per layer, were measured as if each device received everything on its own.
            crossing = record.bytes * others * (shares.gathers if record.part == "weights" else 1 / near)
            within = record.bytes
        elif record.operation == "collective-permute" or self._shifted(record):
            crossing, within = record.bytes, 0.0
        else:
            crossing, within = record.bytes * others, record.bytes * (near - 1) / (ranks - 1)
            if record.part in ("dispatch", "combine") and self.software.once_per_node:
                crossing *= self._copies(nodes)
        slowest = max(crossing / outside, within / inside)
        return slowest + record.count * latency * math.log2(2 * nodes) / 2, "network"

    def _shifted(self, record: Collective) -> bool:
        """Whether an exchange only passes arrays to a neighbour, in a program that need not pad it (`Plan.shift`)."""
        return record.operation == "all-to-all" and record.part in SHIFTED and not self.software.one_program

    def _copies(self, nodes: float) -> float:
        """Nodes that a token with evenly chosen experts is sent to, over its experts in other nodes."""
        reached = nodes * (1 - (1 - 1 / nodes) ** self.k)
        reached = min(reached, max(1.0, nodes * self.groups))
        return reached / self.k

    k, groups = 1, 1.0


def kind_of(record: Collective) -> str:
    """What a collective is for, one of KIND_NAMES."""
    return KINDS.get(record.part, "tensor")


def links_of(hardware: Hardware, software: Software, ledger: Ledger) -> Links:
    """The links of a ledger's plan; its sizes include axes for copies."""
    found = Links(hardware, software, ledger.plan, ledger.sizes)
    found.k = ledger.model.num_experts_per_tok or 1
    found.groups = ledger.model.topk_group / ledger.model.n_group
    return found


def _starts(plan: PlanConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """By axis, how many devices lie between two of its neighbours."""
    tensor, dense = plan.tensor, plan.tensor * plan.context
    inner = plan.expert * plan.expert_tensor
    starts = {
        "tensor": 1, "context": tensor, "data": dense, "stage": dense * plan.data,
        "expert_tensor": 1, "expert": plan.expert_tensor, "expert_data": inner,
        "fsdp": tensor, "fsdp_copies": tensor * sizes["fsdp"],
        "expert_fsdp": inner, "expert_fsdp_copies": inner * sizes["expert_fsdp"],
    }  # fmt: skip
    for name in ("kv_heads", "groups", "norm_groups"):
        starts[name], starts[f"{name}_copies"] = sizes[f"{name}_copies"], 1
    return starts
