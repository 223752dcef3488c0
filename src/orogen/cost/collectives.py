"""The collectives of each kind of layer, and of what comes before and after the layers, as entries of a ledger."""

from orogen.cost.dispatches import dispatch_of
from orogen.cost.ledger import FLOAT32, Ledger


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
            "dropped", "forward", "all-reduce", everywhere, FLOAT32, count=1 + dispatch_of(ledger.plan).overflows
        )
