"""What a program adds to a layer's operations: casts to 8 bits, a further sort of rows, a second gather of parameters;
and the kernels that the host of an eager program launches."""

from collections.abc import Iterable, Sequence

from orogen.cost.dispatches import expert_rows
from orogen.cost.ledger import Collective
from orogen.cost.local import Local
from orogen.cost.operation import Operation, memory
from orogen.simulate.hardware import Software

# Layers whose passes a CUDA graph may hold, by the constant that says so.
GRAPHS = {"graph_attention": "*w+", "graph_mamba": "Mm"}
# Operations of a layer with experts that no graph holds, since their sizes depend on where tokens go.
EXPERTS = ("permute", "sort", "expert_up", "expert_activation", "expert_down", "combine")
UNKNOWN = {*EXPERTS, *(f"cast {name}" for name in EXPERTS)}
# Kernels of an all-to-all dispatcher besides its exchanges, in the forward pass only: counts per expert, summed and
# gathered, the order of the rows, and their copies to the host (Megatron-LM, moe/token_dispatcher.py).
SIZES = 20
# Kernels of a pipeline around each pass: two sends, two receipts and their waits, freed outputs, hooks of gradients.
AROUND = 10
# A graph is launched as one kernel, and its inputs are copied by another.
GRAPH = 2


def added(
    name: str, operations: Sequence[Operation], here: Local, software: Software, *, eight: set[str], cast_bytes: float
) -> list[Operation]:
    """The operations that `software` adds to those of a unit. eight: kinds of products whose operands are cast to 8
    bits.

    Weights are cast once per step, which is not counted.
    """
    found = []
    for operation in operations if software.casts else ():
        if operation.kind in eight and operation.name not in ("head", "router"):
            m, k, n = operation.shape
            read, written = cast_bytes * m * k, cast_bytes * m * n
            found.append(
                memory(f"cast {operation.name}", read, written, makes=operation.makes, kernels=operation.groups)
            )
    if name == "E" and software.sorts:
        rows = expert_rows(here).multiplied * here.model.expert_width * here.itemsize
        moved = 2 * software.sorts * rows
        found.append(memory("sort", moved, moved, makes="rows", kernels=software.sorts))
    return found


def sent_by(records: Iterable[Collective], software: Software) -> list[Collective]:
    """The records of a layer, and the gathers of parameters that a program repeats for the backward pass."""
    records = list(records)
    repeated = {r.axes for r in records if r.part == "weights" and r.phase == "recompute"}
    again = [r for r in records if r.part == "weights" and r.phase == "forward" and r.axes not in repeated]
    return records + [r._replace(phase="recompute") for r in again if software.regathers]


def graph_launches(name: str, software: Software) -> int:
    """Launches of the host for the graph in each pass of a unit; 0 without a graph."""
    return GRAPH * (_graphed(name, software) or (name == "E" and bool(software.graph_router)))


def launches(name: str, operations: Iterable[Operation], records: Iterable[Collective], software: Software) -> float:
    """Kernels and collectives that a host launches outside graphs, kernels as in the forward pass: one per expert for
    grouped products. A layer in a graph has none: its graphs hold its collectives and what it recomputes."""
    if _graphed(name, software):
        return 0
    alone = [op for op in operations if not (name == "E" and software.graph_router and op.name not in UNKNOWN)]
    return sum(max(op.kernels, op.groups) for op in alone if op.name != "accumulate") + sum(r.count for r in records)


def _graphed(name: str, software: Software) -> bool:
    return any(getattr(software, graph) and name in letters for graph, letters in GRAPHS.items())
