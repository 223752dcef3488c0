"""Where a step's time goes, by named scopes: `python -m orogen.report.profile TRACE_DIR [STEPS]`.

At each moment a device computes, or it only communicates ("exposed"), or it is idle: the three add up to the time from
its first event to its last. Communication beside computation is hidden. A collective waits until its last device has
begun; the rest of it is transfer.

Kernels that XLA has put into CUDA graphs have no names of their own in a GPU's trace: with jax 0.11.2 on an H200 more
than a third of the computation is called `command_buffer`, of kind "other". Kernels are launched one by one with
`XLA_FLAGS=--xla_gpu_enable_command_buffer=`, and small ones then have more idle time between them.
"""

import collections
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.report.trace import Event, read_trace

# Outermost named scopes, and those inside them; `tests/report/test_profile.py` compares them with the code's.
KINDS = (
    "Mamba2", "Mamba1", "Attention", "LatentAttention", "MoE", "MLP", "GatedCrossAttention", "GatedMLP", "resampler",
    "captions", "embedding", "final_norm", "cross_entropy", "divergence", "most_likely", "score", "document_sums",
    "send", "reduce_gradients", "gather_parameters", "gradient_norm", "optimizer",
)  # fmt: skip
PARTS = (
    "norm", "in_proj", "conv", "ssd", "gated_norm", "selective_scan", "gate", "core", "out_proj", "up", "activation",
    "down", "router", "experts", "dispatch", "combine", "shared_expert", "weight", "send",
)  # fmt: skip
OTHER = "other"
TABLE = "table.json"  # in the folder of a run's trace
MTP = re.compile(r"mtp_\d+")
ARGUMENT = re.compile(r"(state\.)?params\b")
BACKWARD, RECOMPUTED, FORWARD = "backward", "recomputed", "forward"
WRAPPED = re.compile(r"^(?:\w+\()*([\w.]*)\)*$")


class Scope(NamedTuple):
    """Where an instruction comes from. kind: of the layer, or the part of the step. part: of the layer, the outer
    first, such as experts/dispatch, or empty. phase: forward, backward, or recomputed in the backward pass."""

    kind: str
    part: str
    phase: str


def scope_of(op_name: str) -> Scope:
    """The scope in an op_name such as `jit(step)/shard_map/transpose(jvp(MoE))/router/dot_general`."""
    if ARGUMENT.match(op_name):  # a collective that XLA inserts between an argument's sharding and its use
        return Scope("gather_parameters", "", FORWARD)
    kind, parts = "", []
    for name in (WRAPPED.sub(r"\1", piece) for piece in op_name.split("/")):
        if not kind and name in KINDS:
            kind = name
        elif kind and name in PARTS and name not in parts:
            parts.append(name)
    mtp = MTP.search(op_name)
    phase = FORWARD
    if "rematted_computation" in op_name:
        phase = RECOMPUTED
    elif "transpose(" in op_name:
        phase = BACKWARD
    return Scope((f"{mtp[0]} " if mtp else "") + (kind or OTHER), "/".join(parts), phase)


class Entry(NamedTuple):
    """The category of a device's time. collective: the operation, or None for computation."""

    scope: Scope
    collective: str | None


class Breakdown(NamedTuple):
    """Nanoseconds of one device, by entry.

    alone: computation, and communication without computation beside it; time in which several such entries ran at once
    is split equally. waiting: the part of it before a collective's last device had begun. hidden: communication beside
    computation. counts: numbers of events. window: from the first event to the last; idle: its part in which nothing
    ran.
    """

    alone: dict[Entry, float]
    waiting: dict[Entry, float]
    hidden: dict[Entry, float]
    counts: dict[Entry, int]
    window: float
    idle: float


class _Edge(NamedTuple):
    """The beginning (change 1) or the end (-1) of an event, or of the part of it in which a collective waits."""

    time: float
    change: int
    entry: Entry
    waits: bool


def step_table(path: Path, *, steps: int | None = None) -> dict[str, Any]:
    """Where the time of a step goes, in milliseconds per step; of entries, means over devices.

    path: a folder of jax.profiler.trace. steps: how many the trace has; None: see `count_steps`. Raises ConfigError if
    there is no trace.
    """
    devices = read_trace(path)
    if steps is None:
        steps = count_steps(next(iter(devices.values())))
    return tabulate(devices, steps)


def count_steps(events: Sequence[Event]) -> int:
    """How often the program that took the most time ran, which is how often its rarest instruction did."""
    times: dict[str, float] = collections.defaultdict(float)
    for event in events:
        times[event.module] += event.end - event.start
    largest = max(times, key=lambda module: times[module])
    return min(collections.Counter(event.operation for event in events if event.module == largest).values())


def tabulate(devices: Mapping[str, Sequence[Event]], steps: int) -> dict[str, Any]:
    """`step_table` of the events of each device."""
    begun = last_starts(devices.values())
    breakdowns = {name: breakdown(events, begun) for name, events in devices.items()}
    per_step = lambda ns: round(ns / steps / 1e6, 4)  # noqa: E731
    every = list(breakdowns.values())
    mean = lambda field, entry: per_step(sum(getattr(one, field).get(entry, 0) for one in every) / len(every))  # noqa: E731
    entries = list(dict.fromkeys(entry for one in every for entry in one.counts))
    compute = [{**entry.scope._asdict(), "ms": mean("alone", entry)} for entry in entries if entry.collective is None]
    communication = [
        {
            "operation": entry.collective, **entry.scope._asdict(), "exposed_ms": mean("alone", entry),
            "waiting_ms": mean("waiting", entry), "hidden_ms": mean("hidden", entry),
            "count": round(sum(one.counts.get(entry, 0) for one in every) / len(every) / steps, 2),
        }
        for entry in entries if entry.collective is not None
    ]  # fmt: skip
    return {
        "steps": steps,
        "devices": {name: _device(s, per_step) for name, s in breakdowns.items()},
        "compute": sorted(compute, key=lambda r: -r["ms"]),
        "communication": sorted(communication, key=lambda r: (-r["exposed_ms"], -r["hidden_ms"])),
        "unknown": _unknown(devices.values(), per_step),
    }


def _device(found: Breakdown, per_step: Callable[[float], float]) -> dict[str, float]:
    total = lambda times, wanted: per_step(sum(ns for entry, ns in times.items() if wanted(entry)))  # noqa: E731
    return {
        "step_ms": per_step(found.window),
        "compute_ms": total(found.alone, lambda entry: entry.collective is None),
        "exposed_ms": total(found.alone, lambda entry: entry.collective is not None),
        "waiting_ms": total(found.waiting, lambda entry: True),
        "hidden_ms": total(found.hidden, lambda entry: True),
        "idle_ms": per_step(found.idle),
    }


def _unknown(devices: Iterable[Sequence[Event]], per_step: Callable[[float], float]) -> list[dict[str, Any]]:
    """The kernels of the first device outside all scopes that take longest."""
    times: dict[str, float] = collections.defaultdict(float)
    for event in next(iter(devices)):
        if event.collective is None and scope_of(event.op_name).kind == OTHER:
            times[f"{event.operation or event.kernel} {event.op_name}".strip()] += event.end - event.start
    longest = sorted(times.items(), key=lambda item: -item[1])[:8]
    return [{"kernel": name, "ms": per_step(ns)} for name, ns in longest]


def last_starts(devices: Iterable[Sequence[Event]]) -> dict[tuple[str, str, int], float]:
    """The time at which the last device began each run of each collective, by program, instruction and number of the
    run. A collective that the devices did not run equally often is left out, since its runs cannot be matched."""
    starts: dict[tuple[str, str], list[list[float]]] = collections.defaultdict(list)
    for events in devices:
        own: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
        for event in events:
            if event.collective is not None and event.operation:
                own[event.module, event.operation].append(event.start)
        for key, times in own.items():
            starts[key].append(times)
    found = {}
    for (module, operation), runs in starts.items():
        if len({len(times) for times in runs}) == 1:
            found |= {(module, operation, run): max(times) for run, times in enumerate(zip(*runs, strict=True))}
    return found


def breakdown(events: Sequence[Event], begun: Mapping[tuple[str, str, int], float]) -> Breakdown:
    """How the time of one device is spent. events: in order of start. begun: see `last_starts`."""
    edges: list[_Edge] = []
    counts: collections.Counter[Entry] = collections.Counter()
    runs: collections.Counter[tuple[str, str]] = collections.Counter()
    scopes: dict[str, Scope] = {}
    for event in events:
        scope = scopes.get(event.op_name) or scopes.setdefault(event.op_name, scope_of(event.op_name))
        entry, middle = Entry(scope, event.collective), event.start
        counts[entry] += 1
        if event.collective is not None:
            key = event.module, event.operation
            middle = min(max(begun.get((*key, runs[key]), event.start), event.start), event.end)
            runs[key] += 1
        for start, end, waits in ((event.start, middle, True), (middle, event.end, False)):
            if end > start:
                edges += [_Edge(start, 1, entry, waits), _Edge(end, -1, entry, waits)]
    return _swept(sorted(edges, key=lambda edge: edge[:2]), counts)


def _swept(edges: Sequence[_Edge], counts: dict[Entry, int]) -> Breakdown:
    """The breakdown from the edges of all events, in order."""
    alone, waiting, hidden = (collections.defaultdict[Entry, float](float) for _ in range(3))
    computing: collections.Counter[Entry] = collections.Counter()
    sending: collections.Counter[tuple[Entry, bool]] = collections.Counter()
    idle, before = 0.0, edges[0][0] if edges else 0.0
    for time, change, entry, waits in edges:
        passed = time - before
        if passed > 0 and computing:
            _add(alone, computing, passed)
            _add(hidden, _entries(sending), passed)
        elif passed > 0 and sending:
            _add(alone, _entries(sending), passed)
            late = {pair: n for pair, n in sending.items() if pair[1]}
            _add(waiting, _entries(late), passed * sum(late.values()) / sum(sending.values()))
        else:
            idle += passed
        before = time
        active: Any = sending if entry.collective is not None else computing
        key: Any = (entry, waits) if entry.collective is not None else entry
        active[key] += change
        if not active[key]:
            del active[key]
    window = edges[-1][0] - edges[0][0] if edges else 0.0
    return Breakdown(dict(alone), dict(waiting), dict(hidden), dict(counts), window, idle)


def _entries(pairs: Mapping[tuple[Entry, bool], int]) -> dict[Entry, int]:
    entries: collections.Counter[Entry] = collections.Counter()
    for (entry, _), number in pairs.items():
        entries[entry] += number
    return dict(entries)


def _add(times: dict[Entry, float], active: Mapping[Entry, int], passed: float) -> None:
    """Adds `passed` to the entries that are active, in proportion to how often each is."""
    total = sum(active.values())
    for entry, number in active.items():
        times[entry] += passed * number / total


def main(arguments: Sequence[str]) -> int:
    """Prints the table of the folder that is named first, with the number of steps that may be named second. Returns 0,
    or 2 on bad input."""
    from orogen.report.profile_page import lines

    try:
        if not 1 <= len(arguments) <= 2 or (arguments[1:] and not re.fullmatch(r"[1-9]\d*", arguments[1])):
            raise ConfigError(f"arguments {' '.join(arguments)!r}; expected TRACE_DIR [STEPS]")
        table = step_table(Path(arguments[0]), steps=int(arguments[1]) if arguments[1:] else None)
    except ConfigError as error:
        print(f"orogen: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(table)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
