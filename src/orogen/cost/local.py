"""The sizes of one microbatch on one device, from which what a layer computes and keeps is counted."""

import math
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.ledger import Workload


class Local(NamedTuple):
    """The sizes of one microbatch on one device. tokens: those of its context rank; own: its part of the residual
    stream; routed: those whose experts it chooses; length: the tokens of a whole sequence. dynamic: whether buffers of
    rows have the size of what they hold, as in programs whose shapes need not be known when they are compiled.
    imbalance: assignments of the busiest expert rank over an even share."""

    model: ModelConfig
    plan: PlanConfig
    rows: int
    tokens: int
    own: int
    routed: int
    length: int
    itemsize: int
    dynamic: bool = False
    imbalance: float = 1.0

    def split(self, size: int) -> int:
        """This device's part of heads, channels or groups that `tensor` splits, at least one of them."""
        return max(1, size // self.plan.tensor)


def local(
    model: ModelConfig, plan: PlanConfig, work: Workload, *, dynamic: bool = False, imbalance: float = 1.0
) -> Local:
    """The sizes of `work` on one device. dynamic, imbalance: see `Local`."""
    tokens = work.rows * work.tokens
    own = tokens if plan.stream == "whole" else tokens // plan.tensor
    length = plan.context * work.tokens
    routed = tokens // plan.tensor
    return Local(model, plan, work.rows, tokens, own, routed, length, work.itemsize, dynamic, imbalance)


def expert_rows(here: Local) -> tuple[float, float]:
    """Rows that the busiest device's experts multiply, and rows of the buffers around them, padding included."""
    model, plan = here.model, here.plan
    k, local_experts = model.num_experts_per_tok, model.n_routed_experts // plan.expert
    sent = here.routed * k * plan.expert_tensor
    most = here.routed * plan.expert * plan.expert_tensor * min(k, local_experts)
    if plan.dispatch == "alltoall":
        factor, even = plan.capacity_factor, here.routed * k / model.n_routed_experts
        capacity = here.routed if factor is None else math.ceil(min(here.routed, even * factor))
        rows = model.n_routed_experts * capacity * plan.expert_tensor
        return rows, rows
    filled = min(sent * here.imbalance, most)
    if here.dynamic:
        return filled, filled
    if plan.dispatch == "ragged" and plan.buffer_factor is not None:
        room = math.ceil(min(most // plan.expert_tensor, here.routed * k * plan.buffer_factor)) * plan.expert_tensor
        return min(filled, room), room
    return filled, most
