"""How long schedules take: against their tables, numbers worked out by hand, and formulas."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.parallel.test_schedule import made, schedules

from orogen.parallel.schedule import BACKWARD, IDLE, Schedule
from orogen.simulate.timeline import lockstep_time, timeline


@given(schedules(kinds=("gpipe", "1f1b")))
def test_the_timeline_of_unit_passes_is_the_table(schedule: Schedule):
    drawn = np.zeros_like(schedule.tables.operation)
    for work in timeline(schedule, forward=1, backward=1):
        assert work.end == work.start + 1
        t = int(work.start)
        assert schedule.tables.microbatch[t, work.stage] == work.microbatch
        assert schedule.tables.chunk[t, work.stage] == work.chunk
        drawn[t, work.stage] = work.operation
    np.testing.assert_array_equal(drawn, schedule.tables.operation)


@given(schedules())
def test_the_timeline_keeps_to_the_order_of_the_table(schedule: Schedule):
    work = timeline(schedule, hop=0.25)
    for stage in range(schedule.stages):
        mine = [(w.operation, w.microbatch, w.chunk) for w in work if w.stage == stage]
        ticks = zip(*(table[:, stage].tolist() for table in schedule.tables[:3]), strict=True)
        assert mine == [row for row in ticks if row[0] != IDLE]


def test_stages_may_cost_differently():
    """Stage 0: F 0-1, 1-2, B 13-15, 19-21. Stage 1, three times as slow: F 1-4, 4-7, B 7-13, 13-19."""
    work = timeline(made("gpipe", 2, 2), forward=[[1, 3]])
    assert [(w.start, w.end) for w in work if w.stage == 0] == [(0, 1), (1, 2), (13, 15), (19, 21)]
    assert [(w.start, w.end) for w in work if w.stage == 1] == [(1, 4), (4, 7), (7, 13), (13, 19)]


def test_chunks_may_cost_differently():
    """One stage, no waiting: two chunks of 1 and 5 forward, 7 and 11 backward, three microbatches."""
    work = timeline(made("interleaved", 1, 3, virtual=2), forward=[[1], [5]], backward=[[7], [11]])
    assert max(w.end for w in work) == 3 * (1 + 5 + 7 + 11)
    assert {w.end - w.start for w in work if w.chunk == 1 and w.operation == BACKWARD} == {11}


def test_a_hop_delays_every_stage_but_the_sender():
    """F 0-1, hop, F 1.5-2.5, B 2.5-4.5, hop, B 5-7; the second forward pass starts as soon as the first ends."""
    work = timeline(made("1f1b", 2, 1), hop=0.5)
    assert [(w.start, w.end) for w in work] == [(0, 1), (1.5, 2.5), (2.5, 4.5), (5, 7)]
    assert timeline(made("gpipe", 2, 2), hop=0.5)[1].start == 1


def test_in_lockstep_a_mixed_tick_takes_the_longer_pass():
    """The table of two stages and three microbatches has two ticks without a backward pass, and six with one."""
    assert lockstep_time(made("1f1b", 2, 3)) == 2 * 1 + 6 * 2
    assert lockstep_time(made("1f1b", 2, 3), forward=[[1, 4]], backward=[[5, 3]]) == 1 + 4 + 3 + 5 + 3 + 5 + 3 + 5
    assert lockstep_time(made("interleaved", 1, 3, virtual=2), forward=[[1], [5]]) == 3 * 3 * (1 + 5)


@given(schedules(), st.integers(1, 5), st.integers(1, 5))
def test_in_lockstep_only_1f1b_loses(schedule: Schedule, forward: int, backward: int):
    """Only plain 1F1B mixes passes in a tick; where nothing does, the bubble is the formula's."""
    ticks = schedule.microbatches * schedule.virtual + schedule.stages - 1
    taken = lockstep_time(schedule, forward=forward, backward=backward)
    if schedule.kind in ("gpipe", "eager_1f1b") or schedule.virtual > 1 or schedule.stages == 1:
        assert taken == ticks * (forward + backward)
    elif backward >= forward:
        stages = schedule.stages
        assert taken == stages * forward + (2 * ticks - stages) * backward
