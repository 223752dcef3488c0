"""A pipeline's step as its schedule's table plays it.

Legend: v chunks of a stage, s stages.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orogen.parallel.schedule import Schedule, make_schedule
from orogen.simulate.timeline import Work, lockstep_passes, timeline

# A table of more passes is played with fewer microbatches, and extended by its period: a steady state repeats after
# `stages` microbatches.
MOST_PASSES = 12_000


class Flight(NamedTuple):
    """For each stage, the most (microbatch, chunk) pairs between their forward and backward passes, and the slots in
    which one program of all stages keeps them."""

    in_flight: tuple[int, ...]
    slots: tuple[int, ...]


class Played(NamedTuple):
    """A played schedule: seconds, each stage's passes, and what is in flight.

    work: of the microbatches that were played, `played` of them.
    """

    seconds: float
    work: tuple[Work, ...]
    flight: Flight
    played: int


def play(
    kind: str, forward_vs: NDArray[np.float64], backward_vs: NDArray[np.float64], microbatches: int, *,
    hop: float, lockstep: bool, most: int = MOST_PASSES,
) -> Played:  # fmt: skip
    """The step of `microbatches` under the schedule `kind`. hop: seconds from the end of a pass until the next stage
    has its output.

    Raises ConfigError as `make_schedule` does.
    """
    virtual, stages = forward_vs.shape
    fewer = _fewer(kind, stages, microbatches, virtual, most)
    counts = [microbatches] if fewer == microbatches else [fewer, fewer + stages]
    found = [
        _play(_schedule(kind, stages, count, virtual), (forward_vs, backward_vs), hop=hop, lockstep=lockstep)
        for count in counts
    ]
    seconds, work, schedule = found[-1]
    if len(found) == 2:
        seconds += (microbatches - counts[-1]) / stages * (seconds - found[0][0])
    in_flight = schedule.in_flight
    if kind == "gpipe":
        in_flight = (microbatches * virtual,) * stages
    slots = (microbatches * virtual,) * stages if kind == "gpipe" else schedule.stash_slots
    return Played(seconds, tuple(work), Flight(in_flight, slots), counts[-1])


def estimate(forward_vs: NDArray[np.float64], backward_vs: NDArray[np.float64], microbatches: int) -> float:
    """About how long `play` takes, without playing: the busiest stage, and filling and emptying the pipeline. For
    ranking alone."""
    virtual, stages = forward_vs.shape
    busy_s = (forward_vs + backward_vs).sum(axis=0)
    return float(microbatches * busy_s.max() + (stages - 1) / virtual * busy_s.mean())


def expected_flight(kind: str, stages: int, microbatches: int, virtual: int) -> Flight:
    """What `play` finds in flight, from the forward passes with which each stage warms up."""
    total, found = microbatches * virtual, []
    for stage in range(stages):
        after = stages - stage - 1
        warm_up = after if virtual == 1 else 2 * after + (virtual - 1) * stages
        found.append(total if kind == "gpipe" else min(warm_up + 1, total))
    return Flight(tuple(found), tuple(found))


@functools.lru_cache(maxsize=64)
def _schedule(kind: str, stages: int, microbatches: int, virtual: int) -> Schedule:
    return make_schedule(kind, stages=stages, microbatches=microbatches, virtual=virtual)


def _fewer(kind: str, stages: int, microbatches: int, virtual: int, most: int) -> int:
    """How many microbatches to play: all, or as many as fill the pipeline several times and leave the same rest."""
    if 2 * stages * virtual * microbatches <= most:
        return microbatches
    least = 3 * stages + microbatches % stages
    if kind == "interleaved" and microbatches % stages:  # refused, with the nearest numbers
        return microbatches
    return min(microbatches, least) if least + stages < microbatches else microbatches


def _play(
    schedule: Schedule, costs: Sequence[NDArray[np.float64]], *, hop: float, lockstep: bool
) -> tuple[float, list[Work], Schedule]:
    forward_vs, backward_vs = costs
    player = lockstep_passes if lockstep else timeline
    work = player(schedule, forward=forward_vs, backward=backward_vs, hop=hop)
    return max(w.end for w in work), work, schedule
