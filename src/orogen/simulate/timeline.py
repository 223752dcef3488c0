"""How long a pipeline's step takes under its schedule: each pass as early as possible, or all stages in lockstep.

Legend: t tick, s stage, c chunk.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orogen.parallel.schedule import BACKWARD, FORWARD, IDLE, STEP, Pass, Schedule, last_segment, source_of


class Work(NamedTuple):
    """One microbatch's pass through one chunk, from `start` to `end`."""

    stage: int
    operation: int
    microbatch: int
    chunk: int
    start: float
    end: float


def timeline(
    schedule: Schedule, *, forward: ArrayLike = 1.0, backward: ArrayLike | None = None, hop: float = 0.0
) -> list[Work]:
    """Every pass, in order of start, if each begins as soon as its stage is free and its input has arrived.

    forward, backward: the time of a pass, one number or (virtual, stages). backward None: twice as long as forward.
    hop: time from the end of a pass until another stage has its output; the sender continues meanwhile.
    """
    cost = _costs(schedule, forward, backward)
    orders = []
    for stage in range(schedule.stages):
        columns = (table[:, stage] for table in schedule.tables[:3])
        passes = (entry for entry in zip(*columns, strict=True) if entry[0] != IDLE)
        orders.append([Pass(int(o), int(m), int(c) * schedule.stages + stage) for o, m, c in passes])
    played = _play(orders, lambda step: cost[step.operation].flat[step.segment], hop=hop)
    work = [
        Work(step.segment % schedule.stages, step.operation, step.microbatch, step.segment // schedule.stages, *span)
        for step, *span in played
    ]
    return sorted(work, key=lambda w: (w.start, w.stage))


def lockstep_time(schedule: Schedule, *, forward: ArrayLike = 1.0, backward: ArrayLike | None = None) -> float:
    """The time of a step if no stage begins a tick before all stages have finished the previous one, as in a loop with
    blocking sends.

    Arguments as in `timeline`. A tick in which some stages go forward and others backward takes the longer pass.
    """
    return float(_lockstep(schedule, forward, backward).max(axis=1).sum())


def lockstep_passes(
    schedule: Schedule, *, forward: ArrayLike = 1.0, backward: ArrayLike | None = None, hop: float = 0.0
) -> list[Work]:
    """Every pass, in order of start, in lockstep as in `lockstep_time`; every tick ends with a send of `hop`."""
    time_ts = _lockstep(schedule, forward, backward)
    start_t = np.concatenate([[0.0], np.cumsum(time_ts.max(axis=1) + hop)])
    operation_ts, microbatch_ts, chunk_ts = schedule.tables[:3]
    work = [
        Work(
            int(s), int(operation_ts[t, s]), int(microbatch_ts[t, s]), int(chunk_ts[t, s]), float(start_t[t]),
            float(start_t[t] + time_ts[t, s]),
        )
        for t, s in np.argwhere(operation_ts != IDLE)
    ]  # fmt: skip
    return sorted(work, key=lambda w: (w.start, w.stage))


def _lockstep(schedule: Schedule, forward: ArrayLike, backward: ArrayLike | None) -> NDArray[np.float64]:
    """(t, s): the time of each stage's pass at each tick, 0 where it idles."""
    cost = _costs(schedule, forward, backward)
    operation_ts, _, chunk_ts = schedule.tables[:3]
    stage_s = np.arange(schedule.stages)
    time_ts = np.zeros(operation_ts.shape)
    for operation in STEP:
        time_ts = np.where(operation_ts == operation, cost[operation][chunk_ts, stage_s], time_ts)
    return time_ts


def _play(
    orders: Sequence[Sequence[Pass]], cost: Callable[[Pass], float], *, hop: float
) -> list[tuple[Pass, float, float]]:
    """(pass, start, end) of every pass. Each stage keeps its order and starts each pass as early as possible."""
    stages, last = len(orders), last_segment(orders)
    end, free, played = {}, [0.0] * stages, []
    waiting = [collections.deque(order) for order in orders]
    while any(waiting):
        for stage, steps in enumerate(waiting):
            while steps and ((source := source_of(steps[0], last)) is None or source in end):
                step = steps.popleft()
                travel = hop if source and source.segment % stages != stage else 0
                start = max(free[stage], end[source] + travel if source else 0)
                end[step] = free[stage] = start + cost(step)
                played.append((step, start, end[step]))
    return played


def _costs(schedule: Schedule, forward: ArrayLike, backward: ArrayLike | None) -> dict[int, NDArray[np.float64]]:
    """The time of a pass by operation, (virtual, stages) each."""
    backward = 2 * np.asarray(forward) if backward is None else backward
    shape = schedule.virtual, schedule.stages
    return {FORWARD: np.broadcast_to(forward, shape), BACKWARD: np.broadcast_to(backward, shape)}
