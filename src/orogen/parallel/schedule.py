"""Pipeline schedules as tables: what each stage does at each tick, and the buffer slot of every tensor.

The model is split into `stages * virtual` segments; segment g belongs to stage g % stages, where it is chunk
g // stages. At a tick a stage takes one microbatch forward or backward through one chunk, or idles. What it sends at
the end of a tick can be used from the next tick on. No jax here: the runtime, the simulator and the pictures share
these tables.

Letters: t tick, s stage, g segment, n layers.
"""

import collections
import dataclasses
import heapq
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.pattern import Pattern
from orogen.config.plan import PlanConfig

EAGER = "eager_1f1b"
SCHEDULES = ("gpipe", "1f1b", EAGER, "interleaved")
IDLE, FORWARD, BACKWARD = 0, 1, 2
# A forward pass sends its output to the next segment, a backward pass its gradient to the one before.
STEP = {FORWARD: 1, BACKWARD: -1}
INBOX = {FORWARD: "forward_inbox", BACKWARD: "backward_inbox"}
LANDS = {FORWARD: "forward_lands", BACKWARD: "backward_lands"}


class Tables(NamedTuple):
    """Nine int32 arrays of shape (ticks, stages). A slot equal to the length of its buffer means none.

    operation: IDLE, FORWARD or BACKWARD, of `microbatch` through `chunk` (both 0 when idle).
    stash: the slot that holds this microbatch's activations of this chunk: FORWARD fills it, BACKWARD empties it.
    forward_inbox: the slot from which FORWARD reads its input; none on the first segment, which embeds tokens.
    backward_inbox: the slot from which BACKWARD reads the gradient of its output; none on the last segment, which has
    the loss.
    send: +1, the output goes to the next stage; -1, the gradient goes to the previous one; 0, nothing. Stages are a
    ring: after the last comes the first, with the next chunk.
    forward_lands, backward_lands: the slot for what the previous or the next stage sends at the end of this tick; it is
    written after this tick's reads.
    """

    operation: NDArray[np.int32]
    microbatch: NDArray[np.int32]
    chunk: NDArray[np.int32]
    stash: NDArray[np.int32]
    forward_inbox: NDArray[np.int32]
    backward_inbox: NDArray[np.int32]
    send: NDArray[np.int32]
    forward_lands: NDArray[np.int32]
    backward_lands: NDArray[np.int32]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of one training step, and the number of slots that each stage needs in its three buffers.

    Every stage runs the same program, so each buffer has as many slots as the stage that needs the most.
    """

    kind: str
    stages: int
    microbatches: int
    virtual: int
    tables: Tables
    stash_slots: tuple[int, ...]
    forward_slots: tuple[int, ...]
    backward_slots: tuple[int, ...]

    @property
    def ticks(self) -> int:
        """Length of the step, if a forward and a backward pass of a chunk take one tick each."""
        return len(self.tables.operation)

    @property
    def bubble(self) -> Fraction:
        """A stage's idle ticks, relative to its busy ones."""
        return Fraction(self.ticks, 2 * self.microbatches * self.virtual) - 1

    def forward_only(self) -> "Schedule":
        """The forward passes alone, each as early as possible, for evaluation; nothing is stashed."""
        orders = [
            [
                step
                for step in _order("gpipe", stage, self.stages, self.microbatches, self.virtual)
                if step.operation == FORWARD
            ]
            for stage in range(self.stages)
        ]
        return _assemble(self.kind, orders, self.stages, self.microbatches, self.virtual)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """For each stage, the most (microbatch, chunk) pairs whose forward pass has begun and whose backward pass has
        not ended."""
        operation_ts = self.tables.operation
        held_ts = np.cumsum(operation_ts == FORWARD, axis=0) - np.cumsum(operation_ts == BACKWARD, axis=0)
        return tuple(int(held) for held in held_ts.max(axis=0))


class Pass(NamedTuple):
    """One microbatch's pass through one segment, forward or backward."""

    operation: int
    microbatch: int
    segment: int


def make_schedule(kind: str, *, stages: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The schedule `kind` of `microbatches` over `stages` of `virtual` chunks each.

    gpipe: all forward, then all backward passes; every microbatch is in flight at once (arXiv:1811.06965).
    1f1b: a stage starts a backward pass as soon as it can, and holds at most stages - stage microbatches.
    eager_1f1b: 1f1b with twice as many forward passes to warm up (arXiv:2211.05322, section 4). A tick is then forward
    or backward for all stages, and no stage waits at an exchange for a longer pass of its neighbour; a stage holds at
    most 2 (stages - stage) - 1 microbatches.
    interleaved: 1f1b over `virtual` chunks per stage in Megatron's order, which divides the bubble by `virtual`
    (both: arXiv:2104.04473, section 2.2). With two chunks or more, no tick mixes forward and backward passes.
    Raises ConfigError on an unknown kind, or on chunks or microbatches that it cannot schedule.
    """
    _check(kind, stages, microbatches, virtual)
    orders = [_order(kind, stage, stages, microbatches, virtual) for stage in range(stages)]
    return _assemble(kind, orders, stages, microbatches, virtual)


def plan_schedule(config: PlanConfig, model: ModelConfig) -> Schedule:
    """The schedule of a plan for a model. Raises ConfigError if the pattern has another number of segments."""
    virtual = chunks_per_stage(config, model)
    return make_schedule(config.schedule, stages=config.stage, microbatches=config.microbatches, virtual=virtual)


def chunks_per_stage(config: PlanConfig, model: ModelConfig) -> int:
    """How many chunks of the model each stage has. Raises ConfigError if the pattern has another number of segments."""
    written = len(model.layers.segments)
    virtual = config.virtual or (
        max(written // config.stage, 1) if written > 1 else 2 if config.schedule == "interleaved" else 1
    )
    expected = f"{config.stage * virtual}, stages times chunks per stage, or no |"
    if written > 1 and written != config.stage * virtual:
        raise ConfigError(f"ModelConfig.pattern is {model.pattern!r}, of {written} segments; expected {expected}")
    return virtual


def _assemble(kind: str, orders: Sequence[Sequence[Pass]], stages: int, microbatches: int, virtual: int) -> Schedule:
    tick = _place(orders, mixed=virtual == 1 and kind != EAGER)
    slot, slots = {}, {}
    for buffer, spans in _spans(tick, last=stages * virtual - 1).items():
        slot[buffer], slots[buffer] = _allocate(spans, stages)
    return Schedule(
        kind=kind,
        stages=stages,
        microbatches=microbatches,
        virtual=virtual,
        tables=_fill(tick, slot, {buffer: max(counts) for buffer, counts in slots.items()}, stages),
        stash_slots=slots["stash"],
        forward_slots=slots["forward_inbox"],
        backward_slots=slots["backward_inbox"],
    )


def segments(
    pattern: Pattern, count: int, cost: Callable[[str], float], *, first: float = 0.0, last: float = 0.0
) -> tuple[str, ...]:
    """The layers of each of `count` segments: as the pattern splits them at `|`, or balanced if it does not.

    Balanced: the costliest segment is as cheap as contiguous segments allow, and under that bound costs are as even as
    possible (least sum of squares); of equal solutions, later segments get more, since early stages hold more
    activations. Segments may be empty. cost: the cost of a layer, given its letter; first, last: what the embedding
    adds to the first segment, and the heads and the MTP block to the last. Raises ConfigError if the pattern has
    another number of segments.
    """
    if len(pattern.segments) > 1:
        if len(pattern.segments) != count:
            raise ConfigError(
                f"ModelConfig.pattern is {'|'.join(pattern.segments)!r}, of {len(pattern.segments)} segments; expected "
                f"{count}, stages times chunks per stage, or no |"
            )
        return pattern.segments
    total_n = np.cumsum([0.0, *(cost(letter) for letter in pattern.main)])
    span_nn = np.where(np.tri(len(total_n), k=-1, dtype=bool), np.inf, total_n[None, :] - total_n[:, None])
    cost_gnn = np.repeat(span_nn[None], count, axis=0)
    cost_gnn[0] += first
    cost_gnn[-1] += last
    least, _ = _partition(cost_gnn, np.maximum)
    # Sums that are mathematically equal may differ in their last bits.
    within_gnn = np.where(cost_gnn <= least * (1 + 1e-9), cost_gnn, np.inf)
    _, ends = _partition(within_gnn**2, np.add)
    return tuple(pattern.main[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _check(kind: str, stages: int, microbatches: int, virtual: int) -> None:
    if kind not in SCHEDULES:
        raise ConfigError(f"PlanConfig.schedule is {kind!r}; expected one of {', '.join(SCHEDULES)}")
    if virtual > 1 and kind != "interleaved":
        raise ConfigError(
            f"PlanConfig.schedule is {kind!r}; expected interleaved for {virtual} chunks per stage, "
            "or one chunk per stage"
        )
    if kind == "interleaved" and microbatches % stages:
        below = microbatches // stages * stages
        nearest = f"{below} or {below + stages}" if below else f"{stages}"
        raise ConfigError(
            f"PlanConfig.microbatches is {microbatches}; expected a multiple of stage = {stages} for the schedule "
            f"interleaved, the nearest being {nearest}"
        )


def _order(kind: str, stage: int, stages: int, microbatches: int, virtual: int) -> list[Pass]:
    """What `stage` does, in order: forward passes to warm up, then forward and backward passes in turn, then the rest.

    Chunks alternate after `stages` microbatches each. Source: Megatron-Core, pipeline_parallel/schedules.py.
    """
    total, after = microbatches * virtual, stages - stage - 1
    # With several chunks, the first backward pass waits until the last chunk's first microbatch has come around.
    if kind == "gpipe":
        warm_up = total
    elif virtual == 1:
        warm_up = 2 * after if kind == EAGER else after
    else:
        warm_up = 2 * after + (virtual - 1) * stages
    warm_up = min(warm_up, total)

    forward, backward = [], []
    for turn in range(total):
        cycle, within = divmod(turn, stages * virtual)
        chunk, microbatch = within // stages, cycle * stages + within % stages
        forward.append(Pass(FORWARD, microbatch, chunk * stages + stage))
        backward.append(Pass(BACKWARD, microbatch, (virtual - 1 - chunk) * stages + stage))
    steady = [step for pair in zip(forward[warm_up:], backward, strict=False) for step in pair]
    return forward[:warm_up] + steady + backward[total - warm_up :]


def source_of(step: Pass, last: int) -> Pass | None:
    """The pass whose output this one reads; None for the first segment's forward pass, which reads tokens."""
    if step.operation == BACKWARD and step.segment == last:
        return step._replace(operation=FORWARD)
    source = step._replace(segment=step.segment - STEP[step.operation])
    return source if source.segment >= 0 else None


def _place(orders: Sequence[Sequence[Pass]], *, mixed: bool) -> dict[Pass, int]:
    """The tick of every pass, with each stage keeping to its order and starting each pass as soon as it can.

    Unless mixed, a tick is either forward or backward for all stages, alternating where there is a choice: stages that
    wait for each other at every tick then never wait for a longer pass. Megatron's interleaved order takes the same
    ticks and stash slots, and fewer inbox slots; 1F1B, whose data arrive just in time, would idle every other tick.
    """
    stages, last = len(orders), last_segment(orders)
    waiting = [collections.deque(order) for order in orders]
    tick, t, turn = {}, 0, BACKWARD
    while any(waiting):
        heads = [steps[0] for steps in waiting if steps]
        ready = [step for step in heads if (source := source_of(step, last)) is None or source in tick]
        if not mixed:
            other = FORWARD if turn == BACKWARD else BACKWARD
            turn = other if any(step.operation == other for step in ready) else turn
            ready = [step for step in ready if step.operation == turn]
        for step in ready:
            tick[waiting[step.segment % stages].popleft()] = t
        t += 1
    return tick


def last_segment(orders: Sequence[Sequence[Pass]]) -> int:
    """The number of the segment that has the loss, from each stage's passes."""
    return max(step.segment for step in orders[-1])


def _spans(tick: Mapping[Pass, int], last: int) -> dict[str, dict[Pass, tuple[int, int]]]:
    """For each buffer, the first and the last tick at which it holds something for a pass.

    A stash is held for the forward pass that fills it, an inbox for the pass that reads it.
    """
    spans = {"stash": {}, "forward_inbox": {}, "backward_inbox": {}}
    for step, start in tick.items():
        if step.operation == FORWARD and (back := step._replace(operation=BACKWARD)) in tick:
            spans["stash"][step] = start, tick[back]
        source = source_of(step, last)
        if source and source.operation == step.operation:
            spans[INBOX[step.operation]][step] = tick[source] + 1, start
    return spans


def _allocate(spans: Mapping[Pass, tuple[int, int]], stages: int) -> tuple[dict[Pass, int], tuple[int, ...]]:
    """A slot for each span on its stage, and each stage's number of slots: the most spans that it has at one tick."""
    slot, counts = {}, [0] * stages
    free, held = [[] for _ in range(stages)], [[] for _ in range(stages)]
    for step, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        stage = step.segment % stages
        while held[stage] and held[stage][0][0] < start:
            heapq.heappush(free[stage], heapq.heappop(held[stage])[1])
        if free[stage]:
            slot[step] = heapq.heappop(free[stage])
        else:
            slot[step], counts[stage] = counts[stage], counts[stage] + 1
        heapq.heappush(held[stage], (end, slot[step]))
    return slot, tuple(counts)


def _fill(
    tick: Mapping[Pass, int], slot: Mapping[str, Mapping[Pass, int]], length: Mapping[str, int], stages: int
) -> Tables:
    """The tables of passes at their ticks, with their slots in buffers of these lengths."""
    empty = dict.fromkeys(("operation", "microbatch", "chunk", "send"), 0) | dict(length)
    empty |= {LANDS[operation]: length[INBOX[operation]] for operation in STEP}
    shape = max(tick.values()) + 1, stages
    tables = Tables(**{field: np.full(shape, empty[field], np.int32) for field in Tables._fields})
    for step, t in tick.items():
        stage, toward = step.segment % stages, STEP[step.operation]
        inbox, receiver = INBOX[step.operation], step._replace(segment=step.segment + toward)
        tables.operation[t, stage] = step.operation
        tables.microbatch[t, stage] = step.microbatch
        tables.chunk[t, stage] = step.segment // stages
        tables.stash[t, stage] = slot["stash"].get(step._replace(operation=FORWARD), length["stash"])
        getattr(tables, inbox)[t, stage] = slot[inbox].get(step, length[inbox])
        if receiver in slot[inbox]:
            tables.send[t, stage] = toward
            getattr(tables, LANDS[step.operation])[t, (stage + toward) % stages] = slot[inbox][receiver]
    return tables


def _partition(cost_gnn: NDArray[np.float64], combine: np.ufunc) -> tuple[float, list[int]]:
    """The least combined cost of consecutive segments that cover all layers, and where each ends.

    cost_gnn: the cost of segment g if it has the layers from the first index up to the second.
    """
    best_n = cost_gnn[0, 0]
    starts_gn = []
    for cost_nn in cost_gnn[1:]:
        combined_nn = combine(best_n[:, None], cost_nn)
        starts_gn.append(combined_nn.argmin(axis=0))
        best_n = combined_nn.min(axis=0)
    ends = [len(best_n) - 1]
    for start_n in reversed(starts_gn):
        ends.insert(0, int(start_n[ends[0]]))
    return float(best_n[-1]), ends
