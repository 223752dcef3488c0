"""Which devices share the experts, with and without folding, and what a mixture-of-experts layer sends over each link.

Sending to itself costs a device nothing. Inside a node it uses NVLink, between nodes its own network card.
Letters: g groups, r ranks of a group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orogen.config.model import ModelConfig
from orogen.parallel.fold import Factorization, Folding, fold, refine

NODE = 8  # devices
NVLINK, NETWORK = 450e9, 50e9  # bytes a second that one device sends inside its node, and to other nodes

Groups = NDArray[np.int64]


class Layout(NamedTuple):
    """Dense layers on data x context x tensor; experts over the innermost devices if `folded`."""

    devices: int
    context: int
    tensor: int
    folded: bool
    expert: int
    expert_tensor: int

    @property
    def data(self) -> int:
        return self.devices // (self.context * self.tensor)


class Sent(NamedTuple):
    """The bytes that each device sends to others in its node, and to other nodes."""

    in_node: float
    between: float


def obstacle(layout: Layout) -> str | None:
    """Why the layout is impossible on its number of devices; None if it is possible."""
    if layout.devices % (layout.context * layout.tensor):
        return f"{layout.devices} devices; context {layout.context} x tensor {layout.tensor} does not divide them"
    ways, name = (layout.devices, "devices") if layout.folded else (layout.data, "data ranks")
    return f"{ways} {name}; expert {layout.expert} does not divide them" if ways % layout.expert else None


def expert_groups(layout: Layout) -> dict[str, Groups]:
    """{axis: its groups (g, r)} for expert, expert_tensor and the experts' replicas. Checks that each family partitions
    the devices, and that the three together place every shard of every replica on one device.

    Unfolded is Megatron's order without folding: expert is part of data, whose stride is tensor x context; experts are
    split over tensor like dense layers, and replicated over context.
    """
    sizes = {"data": layout.data, "context": layout.context, "tensor": layout.tensor}
    if layout.folded:
        folding = fold(
            stage=1, data=layout.data, context=layout.context, tensor=layout.tensor,
            expert=layout.expert, expert_tensor=layout.expert_tensor,
        )  # fmt: skip
        copies = folding.logical["expert_data"]
    else:
        experts: Factorization = [
            ("expert_data", layout.data // layout.expert), ("expert", layout.expert),
            ("expert_context", layout.context), ("expert_tensor", layout.expert_tensor),
        ]  # fmt: skip
        folding = refine(list(sizes.items()), experts)
        copies = folding.logical["expert_data"] + folding.logical["expert_context"]
    axes = {"expert": folding.logical["expert"], "expert_tensor": folding.logical["expert_tensor"], "copies": copies}
    found = {name: groups_over(folding, mesh_axes) for name, mesh_axes in axes.items()}
    _check_partitions(found, layout)
    return found


def groups_over(folding: Folding, axes: Sequence[str]) -> Groups:
    """(g, r): groups of devices that differ only along these mesh axes."""
    names, sizes = [name for name, _ in folding.axes], [size for _, size in folding.axes]
    inner = [names.index(name) for name in axes]
    outer = [dim for dim in range(len(names)) if dim not in inner]
    devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(outer + inner)
    return devices.reshape(-1, math.prod(sizes[dim] for dim in inner))


def _check_partitions(found: Mapping[str, Groups], layout: Layout) -> None:
    pieces = layout.expert * layout.expert_tensor
    expected = {"expert": layout.expert, "expert_tensor": layout.expert_tensor, "copies": layout.devices // pieces}
    place = {}
    for name, groups in found.items():
        if groups.shape[1] != expected[name] or sorted(groups.flat) != list(range(layout.devices)):
            raise AssertionError(f"{name} groups of {layout} do not partition its devices by {expected[name]}")
        place[name] = np.empty(layout.devices, int)
        place[name][groups] = np.arange(groups.shape[1])
    if len(set(zip(*place.values(), strict=True))) != layout.devices:
        raise AssertionError(f"{layout}: two devices hold the same shard of the same replica")


def share_in_node(groups_gr: Groups) -> float:
    """The share of the groups that lie inside one node."""
    return float((groups_gr // NODE == groups_gr[:, :1] // NODE).all(1).mean())


def sent(groups_gr: Groups, to_each: float) -> Sent:
    """The bytes by link if each rank sends `to_each` bytes to every other rank of its group. Raises ValueError if
    devices differ."""
    node_gr = groups_gr // NODE
    near = np.unique((node_gr[:, :, None] == node_gr[:, None, :]).sum(2) - 1)
    if len(near) > 1:
        raise ValueError(f"devices have {near.tolist()} peers in their node; expected one number")
    return Sent(float(near[0] * to_each), float((groups_gr.shape[1] - 1 - near[0]) * to_each))


def rows_to_each(model: ModelConfig, layout: Layout, tokens: int, *, capacity: float | None) -> float:
    """The assignments that a device with `tokens` tokens sends to each rank of its expert group: by the capacity factor
    or, if nothing is dropped, the expectation under uniform routing."""
    experts, k = model.n_routed_experts, model.num_experts_per_tok
    if capacity is None:
        return tokens * k / layout.expert
    return experts // layout.expert * min(tokens, math.ceil(tokens * k / experts * capacity))


def layer_traffic(
    model: ModelConfig, layout: Layout, tokens: int, *, capacity: float | None, itemsize: int = 2
) -> dict[str, Sent]:
    """What each collective of a layer sends. The forward pass has these four, the backward pass their transposes, which
    send as much.

    Each rank of expert_tensor needs the tokens of all its ranks (all-gather) and gets the sums for its own tokens back
    (reduce-scatter).
    """
    groups = expert_groups(layout)
    block = rows_to_each(model, layout, tokens, capacity=capacity) * model.expert_width * itemsize
    exchange = sent(groups["expert"], block)
    widen = sent(groups["expert_tensor"], layout.expert * block)
    return {"dispatch": exchange, "all-gather": widen, "reduce-scatter": widen, "combine": exchange}


def total(traffic: Mapping[str, Sent]) -> Sent:
    """Forward and backward."""
    return Sent(2 * sum(s.in_node for s in traffic.values()), 2 * sum(s.between for s in traffic.values()))


def link_seconds(traffic: Mapping[str, Sent]) -> float:
    """Forward and backward: one collective after the other, each as long as its slower link takes."""
    return 2 * sum(max(s.in_node / NVLINK, s.between / NETWORK) for s in traffic.values())
