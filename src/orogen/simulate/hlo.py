"""Reads the collectives of a compiled program: the count of each operation per mesh axes, and the bytes it sends."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orogen.cost.ledger import sent_bytes


class Traffic(NamedTuple):
    """Collectives of one operation over the same mesh axes: their count, and the bytes that one device sends in
    total."""

    count: float
    bytes: float


# {(operation, mesh axes in the mesh's order): what one device sends}.
Table = dict[tuple[str, tuple[str, ...]], Traffic]

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
         "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?\S+ = (?P<result>.*?) (?P<operation>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"ragged-all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation|body)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


def add(table: Table, key: tuple[str, tuple[str, ...]], count: float, size: float) -> None:
    """Adds `count` collectives, which send `size` bytes in total, to the entry `key`."""
    before = table.get(key, Traffic(0, 0))
    table[key] = Traffic(before.count + count, before.bytes + size)


def hlo_collectives(text: str, sizes: Mapping[str, int], unbounded: int | None = None) -> Table:
    """The collectives of a compiled program, each counted once per iteration of the loops around it.

    sizes: of the mesh axes, outermost first, as partition ids enumerate them. unbounded: the iterations of loops whose
    number depends on data; None: they are refused. Raises ValueError on an operation, group or loop that it cannot
    read: an overlooked collective would look free.
    """
    table: Table = {}
    lines = list(_lines(text))
    runs = _runs(lines, unbounded)
    for name, line in lines:
        match = INSTRUCTION.match(line)
        if match is None or not runs.get(name):
            continue
        operation, groups = match["operation"], _groups(line)
        ranks = math.prod(sizes.values()) if not groups else len(groups[0])
        results = _sizes(_received(match))
        held = sum(results) * {"all-gather": 1 / ranks, "reduce-scatter": ranks}.get(operation, 1)
        if ranks > 1:
            cycles = operation == "collective-permute"
            key = operation, _axes(groups or [tuple(range(ranks))], sizes, cycles=cycles)
            # XLA joins several arrays in one all-reduce, but lists one array of an all-to-all as a piece per rank.
            arrays = max(len(results) // ranks, 1) if operation == "all-to-all" else len(results)
            add(table, key, runs[name] * arrays, runs[name] * sent_bytes(operation, held, ranks))
    return table


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(computation, line) of every instruction; the entry computation is called ENTRY."""
    name = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = "ENTRY" if match["entry"] else match["name"]
        yield name, line


def _runs(lines: list[tuple[str, str]], unbounded: int | None) -> dict[str, int]:
    """How often each computation runs. Each branch of a conditional counts as if it were taken."""
    calls: dict[str, list[tuple[str, int]]] = {}
    collective = {name for name, line in lines if INSTRUCTION.match(line)}
    for name, line in lines:
        count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        unknown = " while(" in line and count is None
        if unknown and unbounded is None and set(CALLED.findall(line)) & collective:
            raise ValueError(f"a loop with collectives and an unknown trip count: {line.strip()[:200]}")
        called = [*CALLED.findall(line), *(b.strip(" %") for m in BRANCHES.findall(line) for b in m.split(","))]
        times = int(count[1]) if count else 1
        if unknown and unbounded is not None:
            times = unbounded
        calls.setdefault(name, []).extend((each, times) for each in called)
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for each, count in calls.get(name, []):
            visit(each, times * count)

    visit("ENTRY", 1)
    return runs


def _received(match: re.Match[str]) -> str:
    """The part of an instruction's result that it receives: what starts a collective gives its operands too, as
    ((operands), results, …); an all-reduce may give its results alone."""
    result = match["result"]
    if not match["start"] or not result.startswith("((" if match["operation"] == "all-reduce" else "("):
        return result
    depth, found = 0, [""]
    for letter in result[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found[1]


def _sizes(result: str) -> list[int]:
    """Bytes of each array in an instruction's result."""
    return [BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in
            re.findall(r"(\w+)\[([\d,]*)\]", result)]  # fmt: skip


def _groups(line: str) -> list[tuple[int, ...]]:
    """The partitions that communicate: groups, or the cycles of a permutation; empty for one group of all."""
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
        # Devices in another order are written as a list or in the iota form of groups.
        whole = f"[1,{math.prod(axes.values())}]<={match[2]}" if "[" in (match[2] or "") else f"{{{{{match[2]}}}}}"
        (ids,) = _groups(f"replica_groups={whole}") if match[2] else (None,)
        return [tuple(ids[i] for i in group) for group in groups] if ids else groups
    if "replica_groups={}" in line:
        return []
    raise ValueError(f"replica groups of an unknown form: {line.strip()[:200]}")


def _mesh_groups(axes: dict[str, int], taken: Sequence[tuple[str, str, str]]) -> list[tuple[int, ...]]:
    """Groups along whole mesh axes or parts of axes. taken: (axis, ranks outside the part, size of the part)."""
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
    """The connected components of a permutation: sets of devices that reach one another."""
    joined = {device: {device} for pair in pairs for device in pair}
    for source, target in pairs:
        union = joined[source] | joined[target]
        for device in union:
            joined[device] = union
    return sorted({tuple(sorted(group)) for group in joined.values()})


def _axes(groups: list[tuple[int, ...]], sizes: Mapping[str, int], *, cycles: bool) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ. Raises ValueError if a group does not span these axes
    whole; cycles need not: a shift by more than one rank may split an axis into several."""
    shape = tuple(sizes.values())
    coordinates = [np.stack(np.unravel_index(np.asarray(group), shape), 1) for group in groups]
    differ = np.any([(each != each[:1]).any(0) for each in coordinates], axis=0)
    axes = tuple(itertools.compress(sizes, differ))
    if not cycles and any(len(group) != math.prod(sizes[name] for name in axes) for group in groups):
        raise ValueError(f"groups {groups[:2]} are no mesh axes of {dict(sizes)}")
    return axes
