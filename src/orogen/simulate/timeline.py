"""How long a pipeline's step takes by its schedule: each pass as soon as it can be, or all stages tick by tick.

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
    """Every pass in order of its start, if each begins as soon as its stage is free and its input has arrived.

    forward, backward: time of a pass, one number or (virtual, stages); None: backward takes twice as long as forward.
    hop: time from the end of a pass until another stage has its output; the sender continues meanwhile.
    """
    cost = _costs(schedule, forward, backward)
    orders = []
    for stage in range(schedule.stages):
        columns = (table[:, stage] for table in schedule.tables[:3])
        rows = (row for row in zip(*columns, strict=True) if row[0] != IDLE)
        orders.append([Pass(int(o), int(m), int(c) * schedule.stages + stage) for o, m, c in rows])
    played = _play(orders, lambda step: cost[step.operation].flat[step.segment], hop=hop)
    work = [
        Work(step.segment % schedule.stages, step.operation, step.microbatch, step.segment // schedule.stages, *span)
        for step, *span in played
    ]
    return sorted(work, key=lambda w: (w.start, w.stage))


def lockstep_time(schedule: Schedule, *, forward: ArrayLike = 1.0, backward: ArrayLike | None = None) -> float:
    """Time of the step if no stage begins a tick before all have ended the previous one, as in a loop with blocking
    sends.

    Arguments as in `timeline`. A tick in which some stages go forward and others backward takes the longer pass.
    """
    cost = _costs(schedule, forward, backward)
    operation_ts, _, chunk_ts = schedule.tables[:3]
    stage_s = np.arange(schedule.stages)
    taken_ts = np.zeros(operation_ts.shape)
    for operation in STEP:
        taken_ts = np.where(operation_ts == operation, cost[operation][chunk_ts, stage_s], taken_ts)
    return float(taken_ts.max(axis=1).sum())


def _play(
    orders: Sequence[Sequence[Pass]], cost: Callable[[Pass], float], *, hop: float
) -> list[tuple[Pass, float, float]]:
    """(pass, start, end) of every pass, with each stage keeping to its order and starting each pass as soon as it
    can."""
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
    """Time of a pass by operation, each (virtual, stages)."""
    backward = 2 * np.asarray(forward) if backward is None else backward
    shape = schedule.virtual, schedule.stages
    return {FORWARD: np.broadcast_to(forward, shape), BACKWARD: np.broadcast_to(backward, shape)}
