"""What each dispatch sends to bring tokens to their experts and back, and the rows that it gives them."""

import math
from collections.abc import Callable
from typing import NamedTuple

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.ledger import FLOAT32, INT32, Ledger
from orogen.cost.local import Local


class ExpertRows(NamedTuple):
    """Rows on the busiest device: those that its experts multiply, those of the buffers around them, padding included,
    and those that it gets back of its own tokens."""

    multiplied: float
    room: float
    returned: float


class DispatchCosts(NamedTuple):
    """collectives: records what the dispatch sends for one layer. rows: see `ExpertRows`. exchanges: whether rows
    travel, from a buffer to a buffer. overflows: whether its buffers may lack room for an assignment, which is
    counted."""

    collectives: Callable[[Ledger], None]
    rows: Callable[[Local], ExpertRows]
    exchanges: bool = True
    overflows: bool = False


def dispatch_of(plan: PlanConfig) -> DispatchCosts:
    """The costs of the plan's dispatch. Raises KeyError for one that has none."""
    return DISPATCH_COSTS[plan.dispatch]


def expert_rows(here: Local) -> ExpertRows:
    """The rows of the plan's dispatch."""
    return dispatch_of(here.plan).rows(here)


def _gathered_tokens(ledger: Ledger) -> None:
    tokens, k, axes = ledger.own_tokens, ledger.model.num_experts_per_tok, ("expert", "expert_tensor")
    width = tokens * ledger.model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", axes, width, name="rows")
    ledger.gather("dispatch", axes, tokens * k * INT32, gradient=False, name="routing")  # each token's experts
    ledger.gather("dispatch", axes, tokens * k, gradient=False, name="routing")  # whether there is room, one byte each
    ledger.gather("combine", axes, tokens * k * FLOAT32)  # the weights
    projected = ledger.model.moe_latent_size is not None
    ledger.scatter("combine", axes, width * ledger.ranks(axes), needed=projected, name="combined")


def _gathered_rows(here: Local) -> ExpertRows:
    filled, most = _filled(here)
    room = filled if here.dynamic else most
    return ExpertRows(filled, room, room)


def _exchanged_assignments(ledger: Ledger) -> None:
    model, tokens, factor = ledger.model, ledger.own_tokens, ledger.plan.capacity_factor
    capacity = _capacity(model, tokens, factor)
    buffers = model.n_routed_experts * capacity * model.expert_width * ledger.work.itemsize
    ledger.both("dispatch", "all-to-all", ("expert",), buffers, name="rows")
    _split_experts(ledger, buffers)
    ledger.both("combine", "all-to-all", ("expert",), buffers, name="expert_out")


def _exchanged_rows(here: Local) -> ExpertRows:
    capacity = _capacity(here.model, here.routed, here.plan.capacity_factor)
    rows = here.model.n_routed_experts * capacity * here.plan.expert_tensor
    return ExpertRows(rows, rows, rows)


def _capacity(model: ModelConfig, tokens: int, factor: float | None) -> int:
    even = tokens * model.num_experts_per_tok / model.n_routed_experts
    return tokens if factor is None else math.ceil(min(tokens, even * factor))


def _ragged_assignments(ledger: Ledger) -> None:
    model, plan, sent = ledger.model, ledger.plan, ledger.own_tokens * ledger.model.num_experts_per_tok
    room = ledger.own_tokens * plan.expert * min(model.num_experts_per_tok, model.n_routed_experts // plan.expert)
    room = room if plan.buffer_factor is None else math.ceil(min(room, sent * plan.buffer_factor))
    counted, width = model.n_routed_experts * INT32, model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", ("expert",), counted, gradient=False, name="routing")
    ledger.both("dispatch", "ragged-all-to-all", ("expert",), min(sent, room) * width, name="rows")
    ledger.gather("dispatch", ("expert_tensor",), counted, gradient=False, name="routing")
    _split_experts(ledger, room * width)
    ledger.both("combine", "ragged-all-to-all", ("expert",), min(sent, room) * width, name="expert_out")


def _ragged_rows(here: Local) -> ExpertRows:
    plan, returned = here.plan, here.routed * here.model.num_experts_per_tok
    filled, most = _filled(here)
    if here.dynamic:
        return ExpertRows(filled, filled, returned)
    if plan.buffer_factor is None:
        return ExpertRows(filled, most, returned)
    room = math.ceil(min(most // plan.expert_tensor, returned * plan.buffer_factor)) * plan.expert_tensor
    return ExpertRows(min(filled, room), room, returned)


def _filled(here: Local) -> tuple[float, float]:
    """Assignments of the busiest device, and as many as it could have at most."""
    model, plan = here.model, here.plan
    k, local_experts = model.num_experts_per_tok, model.n_routed_experts // plan.expert
    most = here.routed * plan.expert * plan.expert_tensor * min(k, local_experts)
    return min(here.routed * k * plan.expert_tensor * here.imbalance, most), most


def _split_experts(ledger: Ledger, held: int) -> None:
    """Ranks that split an expert's hidden units gather each other's assignments and sum their partial outputs."""
    axes = ("expert_tensor",)
    ledger.gather("dispatch", axes, held, name="rows")
    ledger.scatter("combine", axes, held * ledger.ranks(axes), needed=True, name="expert_out")


# By name of `PlanConfig.dispatch`.
DISPATCH_COSTS = {
    "allgather": DispatchCosts(_gathered_tokens, _gathered_rows, exchanges=False),
    "alltoall": DispatchCosts(_exchanged_assignments, _exchanged_rows),
    "ragged": DispatchCosts(_ragged_assignments, _ragged_rows, overflows=True),
}
