"""Reads the collectives of a compiled program: how many of each operation over which mesh axes, and what they send."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orogen.cost.ledger import sent_bytes


class Traffic(NamedTuple):
    """Collectives of one operation over the same mesh axes: their number, and the bytes that one device sends in
    all."""

    count: float
    bytes: float


# (operation, mesh axes in the mesh's order): what one device sends by it.
Table = dict[tuple[str, tuple[str, ...]], Traffic]

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?\S+ = (?P<result>.*?) (?P<operation>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"ragged-all-to-all|collective-permute|collective-broadcast)\("
)
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation|body)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


def add(table: Table, key: tuple[str, tuple[str, ...]], count: float, size: float) -> None:
    """Adds collectives of one operation to those over the same axes."""
    before = table.get(key, Traffic(0, 0))
    table[key] = Traffic(before.count + count, before.bytes + size)


def hlo_collectives(text: str, sizes: Mapping[str, int]) -> Table:
    """The collectives of a compiled program, each counted as often as the loops around it iterate.

    sizes: of the mesh axes, outermost first; partition ids count through them. Raises ValueError on an operation,
    group or loop that it cannot read: an overlooked collective would look like a free one.
    """
    table: Table = {}
    lines = list(_lines(text))
    turns = _turns(lines)
    for name, line in lines:
        match = INSTRUCTION.match(line)
        if match is None or not turns.get(name):
            continue
        operation, groups = match["operation"], _groups(line)
        ranks = math.prod(sizes.values()) if not groups else len(groups[0])
        results = _sizes(match["result"])
        held = sum(results) * {"all-gather": 1 / ranks, "reduce-scatter": ranks}.get(operation, 1)
        if ranks > 1:
            cycles = operation == "collective-permute"
            key = operation, _axes(groups or [tuple(range(ranks))], sizes, cycles=cycles)
            # XLA sums several arrays at once, and exchanges one as a piece for each rank.
            arrays = max(len(results) // ranks, 1) if operation == "all-to-all" else len(results)
            add(table, key, turns[name] * arrays, turns[name] * sent_bytes(operation, held, ranks))
    return table


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(computation, line) of every instruction; the entry computation is called ENTRY."""
    name = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = "ENTRY" if match["entry"] else match["name"]
        yield name, line


def _turns(lines: list[tuple[str, str]]) -> dict[str, int]:
    """How often each computation runs; a branch counts once."""
    calls: dict[str, list[tuple[str, int]]] = {}
    collective = {name for name, line in lines if INSTRUCTION.match(line)}
    for name, line in lines:
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if " while(" in line and count is None and set(CALLED.findall(line)) & collective:
            raise ValueError(f"a loop with collectives, of unknown length: {line.strip()[:200]}")
        called = [*CALLED.findall(line), *(b.strip(" %") for m in BRANCHES.findall(line) for b in m.split(","))]
        calls.setdefault(name, []).extend((each, int(count[1]) if count else 1) for each in called)
    turns: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        turns[name] = turns.get(name, 0) + times
        for each, count in calls.get(name, []):
            visit(each, times * count)

    visit("ENTRY", 1)
    return turns


def _sizes(result: str) -> list[int]:
    """Bytes of each array in an instruction's result."""
    return [BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in
            re.findall(r"(\w+)\[([\d,]*)\]", result)]  # fmt: skip


def _groups(line: str) -> list[tuple[int, ...]]:
    """The partitions that take part together: groups, or the cycles of a permutation; empty for all."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return _cycles([tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)", "{" + match[1])])
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(x) for x in part.split(",")] if part else None for part in match.groups())
        ids = np.arange(math.prod(dims or ())).reshape(dims or ())
        return [tuple(row.tolist()) for row in (ids.transpose(order) if order else ids).reshape(shape or ())]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        groups = _mesh_groups(axes, re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3]))
        # Devices in another order are listed, or enumerated as those of groups are.
        whole = f"[1,{math.prod(axes.values())}]<={match[2]}" if "[" in (match[2] or "") else f"{{{{{match[2]}}}}}"
        (ids,) = _groups(f"replica_groups={whole}") if match[2] else (None,)
        return [tuple(ids[i] for i in group) for group in groups] if ids else groups
    if "replica_groups={}" in line:
        return []
    raise ValueError(f"replica groups of an unknown form: {line.strip()[:200]}")


def _mesh_groups(axes: dict[str, int], taken: Sequence[tuple[str, str, str]]) -> list[tuple[int, ...]]:
    """Groups along whole axes of a mesh, or along parts of one: (axis, ranks outside the part, its size)."""
    shape, moved = [], []
    for name, size in axes.items():
        own = [(int(before), int(part)) if part else (1, size) for axis, before, part in taken if axis == name]
        edges = sorted({1, size, *(edge for before, part in own for edge in (before, before * part))})
        for low, high in itertools.pairwise(edges):
            if any(before <= low and high <= before * part for before, part in own):
                moved.append(len(shape))
            shape.append(high // low)
    kept = [dim for dim in range(len(shape)) if dim not in moved]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(kept + moved)
    return [tuple(row.tolist()) for row in ids.reshape(-1, math.prod(shape[dim] for dim in moved))]


def _cycles(pairs: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The devices that a permutation connects, as sets of equal reach."""
    joined = {device: {device} for pair in pairs for device in pair}
    for source, target in pairs:
        union = joined[source] | joined[target]
        for device in union:
            joined[device] = union
    return sorted({tuple(sorted(group)) for group in joined.values()})


def _axes(groups: list[tuple[int, ...]], sizes: Mapping[str, int], *, cycles: bool) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ. Raises ValueError if they are not all along those
    axes; in cycles, of shifts by more than one rank, they need not be."""
    shape = tuple(sizes.values())
    places = [np.stack(np.unravel_index(np.asarray(group), shape), 1) for group in groups]
    differ = np.any([(place != place[:1]).any(0) for place in places], axis=0)
    axes = tuple(itertools.compress(sizes, differ))
    if not cycles and any(len(group) != math.prod(sizes[name] for name in axes) for group in groups):
        raise ValueError(f"groups {groups[:2]} are no mesh axes of {dict(sizes)}")
    return axes
