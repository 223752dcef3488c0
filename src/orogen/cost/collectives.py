"""The collectives of each kind of layer, and of what comes before and after the layers, as entries of a ledger."""

import math
from collections.abc import Callable

from orogen.cost.ledger import FLOAT32, INT32, Ledger


def block(ledger: Ledger, part: str = "sequence", *, needed: bool = False, name: str = "") -> None:
    """A layer split over `tensor`: its input enters from the residual stream, the ranks' summed output leaves to it."""
    enter(ledger, part)
    leave(ledger, part, needed=needed, name=name)


def enter(ledger: Ledger, part: str) -> None:
    """What `Plan.enter` sends: the other ranks' pieces of the residual stream; nothing if each holds all of it."""
    if ledger.plan.stream == "time":
        ledger.gather(part, ("tensor",), ledger.stream / ledger.plan.tensor)


def leave(ledger: Ledger, part: str, *, needed: bool = False, name: str = "") -> None:
    """What `Plan.leave` sends: the ranks' partial outputs are summed, and each keeps its piece of the sum, or all of
    it. In the second case their gradients are summed in the backward pass."""
    if ledger.plan.stream == "time":
        ledger.scatter(part, ("tensor",), ledger.stream, needed=needed, name=name)
    else:
        ledger.both(part, "all-reduce", ("tensor",), ledger.stream, needed=needed, name=name)


def _gathered_tokens(ledger: Ledger) -> None:
    tokens, k, axes = ledger.own_tokens, ledger.model.num_experts_per_tok, ("expert", "expert_tensor")
    width = tokens * ledger.model.expert_width * ledger.work.itemsize
    ledger.gather("dispatch", axes, width, name="rows")
    ledger.gather("dispatch", axes, tokens * k * INT32, gradient=False, name="routing")  # each token's experts
    ledger.gather("dispatch", axes, tokens * k, gradient=False, name="routing")  # whether there is room, one byte each
    ledger.gather("combine", axes, tokens * k * FLOAT32)  # the weights
    projected = ledger.model.moe_latent_size is not None
    ledger.scatter("combine", axes, width * ledger.ranks(axes), needed=projected, name="combined")


def _exchanged_assignments(ledger: Ledger) -> None:
    model, tokens, factor = ledger.model, ledger.own_tokens, ledger.plan.capacity_factor
    even = tokens * model.num_experts_per_tok / model.n_routed_experts
    capacity = tokens if factor is None else math.ceil(min(tokens, even * factor))
    buffers = model.n_routed_experts * capacity * model.expert_width * ledger.work.itemsize
    ledger.both("dispatch", "all-to-all", ("expert",), buffers, name="rows")
    _split_experts(ledger, buffers)
    ledger.both("combine", "all-to-all", ("expert",), buffers, name="expert_out")


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


def _split_experts(ledger: Ledger, held: int) -> None:
    """Ranks that split an expert's hidden units gather each other's assignments and sum their partial outputs."""
    axes = ("expert_tensor",)
    ledger.gather("dispatch", axes, held, name="rows")
    ledger.scatter("combine", axes, held * ledger.ranks(axes), needed=True, name="expert_out")


def outer(ledger: Ledger) -> None:
    """Embedding, head and loss at every depth of prediction, and the batch's counts."""
    plan, model, tokens = ledger.plan, ledger.model, ledger.work.rows * ledger.work.tokens
    depths = 1 + model.mtp_depths
    # The softmax over all ranks' columns: the maximum, the sum of exponentials, the target's logit.
    chunk = tokens if plan.cross_entropy == "full" else min(plan.logit_rows, tokens)
    for depth in range(depths):
        embedded(ledger, depth)
        enter(ledger, "head")
        ledger.add(
            "cross-entropy", "forward", "all-reduce", ("tensor",), chunk * FLOAT32, count=3 * -(-tokens // chunk)
        )
        # Later tokens, their weights and documents.
        ledger.shift("targets", ("context",), ledger.work.rows * (depth + 1) * FLOAT32, 3 * 2)
    ledger.add("cross-entropy", "forward", "all-reduce", ("data", "context"), depths * FLOAT32)
    _counts(ledger, ledger.work.rows * plan.microbatches, depths)


def embedded(ledger: Ledger, depth: int) -> None:
    """The embedding of the tokens at MTP depth `depth`. The tokens beyond a rank's part, their positions and their
    documents come from its neighbours."""
    leave(ledger, "embedding")
    ledger.shift("targets", ("context",), ledger.work.rows * depth * FLOAT32, 3 * 2)


def _counts(ledger: Ledger, sequences: int, depths: int) -> None:
    """Counts of targets, tokens and sequences over the whole batch; a sequence counts if any context rank holds one of
    its tokens."""
    for depth in range(depths):
        ledger.shift("counts", ("context",), sequences * (depth + 1) * FLOAT32, 2 * 2, phase="update")
        ledger.shift("counts", ("context",), sequences * depth * FLOAT32, 2, phase="update")
    ledger.add("counts", "update", "all-reduce", ("data", "context"), depths * FLOAT32, count=2)
    ledger.add("counts", "update", "all-reduce", ("context",), sequences * FLOAT32, count=depths)
    ledger.add("counts", "update", "all-reduce", ("data",), depths * FLOAT32)


def load(ledger: Ledger) -> None:
    """Each expert's load in every layer, and the numbers of dropped assignments."""
    pattern, everywhere = ledger.model.layers, ("data", "context", "tensor")
    layers = (pattern.main + pattern.mtp).count("E")
    if layers:
        ledger.add("load", "forward", "all-reduce", everywhere, ledger.model.n_routed_experts * FLOAT32, count=layers)
        # Assignments without room at an expert, and in a ragged buffer.
        ledger.add(
            "dropped", "forward", "all-reduce", everywhere, FLOAT32, count=1 + (ledger.plan.dispatch in BUFFERED)
        )


# By name of `PlanConfig.dispatch`: records what it takes to send a layer's tokens to their experts and back.
DISPATCH_COLLECTIVES: dict[str, Callable[[Ledger], None]] = {
    "allgather": _gathered_tokens,
    "alltoall": _exchanged_assignments,
    "ragged": _ragged_assignments,
}
# Dispatches whose buffers may lack room for an assignment, which is counted.
BUFFERED = {"ragged"}
