"""The sizes of one microbatch on one device, from which what a layer computes and keeps is counted."""

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
