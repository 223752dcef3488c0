"""Pipeline schedules: against the papers' figures, on a machine that follows only the tables, and against formulas."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orogen.config.checks import ConfigError
from orogen.config.model import parse_pattern
from orogen.parallel.schedule import (
    BACKWARD,
    FORWARD,
    IDLE,
    SCHEDULES,
    Schedule,
    make_schedule,
    segments,
)
from orogen.simulate.timeline import timeline


def made(kind: str, stages: int, microbatches: int, virtual: int = 1) -> Schedule:
    return make_schedule(kind, stages=stages, microbatches=microbatches, virtual=virtual)


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[str, ...] = SCHEDULES) -> Schedule:
    kind, stages = draw(st.sampled_from(kinds)), draw(st.integers(1, 7))
    if kind == "interleaved":
        return made(kind, stages, stages * draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return made(kind, stages, draw(st.integers(1, 15)))


def ticks_of(schedule: Schedule, stage: int) -> str:
    """What a stage does, tick by tick: F3 is microbatch 3 (of 1, 2, ...) forward, B3b backward through chunk b."""
    letters = ["", *"bcdefgh"]
    ticks = zip(*(table[:, stage] for table in schedule.tables[:3]), strict=True)
    return " ".join("." if o == IDLE else f"{'FB'[o - 1]}{m + 1}{letters[c]}" for o, m, c in ticks)


def order_of(schedule: Schedule, stage: int) -> str:
    return " ".join(cell for cell in ticks_of(schedule, stage).split() if cell != ".")


# By hand, and against figures 3 and 4 of arXiv:2104.04473 (4 devices, 8 microbatches)


def test_gpipe_takes_all_forward_then_all_back():
    schedule = made("gpipe", 4, 8)
    passes = "F1 F2 F3 F4 F5 F6 F7 F8", "B1 B2 B3 B4 B5 B6 B7 B8"
    for stage in range(4):
        idle = " ".join("." * (6 - 2 * stage))
        edge = [" ".join("." * stage)]
        assert ticks_of(schedule, stage).split() == " ".join([*edge, passes[0], idle, passes[1], *edge]).split()


def test_1f1b_has_the_order_of_the_figure():
    schedule = made("1f1b", 4, 8)
    assert order_of(schedule, 0) == "F1 F2 F3 F4 B1 F5 B2 F6 B3 F7 B4 F8 B5 B6 B7 B8"
    assert order_of(schedule, 1) == "F1 F2 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 F8 B6 B7 B8"
    assert order_of(schedule, 2) == "F1 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 F8 B7 B8"
    assert order_of(schedule, 3) == "F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 F8 B8"


def test_eager_1f1b_warms_up_twice_as_long():
    """By hand. Every tick is forward or backward for all stages."""
    schedule = made("eager_1f1b", 3, 6)
    assert ticks_of(schedule, 0) == "F1 F2 F3 . F4 . F5 B1 F6 B2 . B3 . B4 B5 B6"
    assert ticks_of(schedule, 1) == ". F1 F2 . F3 B1 F4 B2 F5 B3 F6 B4 . B5 B6 ."
    assert ticks_of(schedule, 2) == ". . F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 . ."


@given(schedules(kinds=("eager_1f1b",)))
def test_eager_1f1b_mixes_no_tick(schedule: Schedule):
    for row in schedule.tables.operation:
        assert len(set(row.tolist()) - {IDLE}) == 1


@given(schedules(kinds=("eager_1f1b",)))
def test_eager_1f1b_holds_almost_twice_what_1f1b_holds(schedule: Schedule):
    left = (schedule.stages - stage for stage in range(schedule.stages))
    assert schedule.in_flight == tuple(min(2 * n - 1, schedule.microbatches) for n in left)


def test_interleaved_has_the_order_of_the_figure():
    schedule = made("interleaved", 4, 8, virtual=2)
    assert order_of(schedule, 0) == (
        "F1 F2 F3 F4 F1b F2b F3b F4b F5 F6 F7 B1b F8 B2b F5b B3b F6b B4b F7b B1 F8b "
        "B2 B3 B4 B5b B6b B7b B8b B5 B6 B7 B8"
    )
    assert order_of(schedule, 3) == (
        "F1 F2 F3 F4 F1b B1b F2b B2b F3b B3b F4b B4b F5 B1 F6 B2 F7 B3 F8 B4 "
        "F5b B5b F6b B6b F7b B7b F8b B8b B5 B6 B7 B8"
    )


def test_every_table_of_a_small_1f1b():
    """Two stages, three microbatches, worked on paper; the inboxes have one slot, so that 1 means none there."""
    schedule = made("1f1b", 2, 3)
    assert ticks_of(schedule, 0) == "F1 F2 . B1 F3 B2 . B3"
    assert ticks_of(schedule, 1) == ". F1 B1 F2 B2 F3 B3 ."
    expected = {
        "stash": ([0, 1, 2, 0, 0, 1, 2, 0], [2, 0, 0, 0, 0, 0, 0, 2]),
        "forward_inbox": ([1] * 8, [1, 0, 1, 0, 1, 0, 1, 1]),
        "backward_inbox": ([1, 1, 1, 0, 1, 0, 1, 0], [1] * 8),
        "send": ([1, 1, 0, 0, 1, 0, 0, 0], [0, 0, -1, 0, -1, 0, -1, 0]),
        "forward_lands": ([1] * 8, [0, 0, 1, 1, 0, 1, 1, 1]),
        "backward_lands": ([1, 1, 0, 1, 0, 1, 0, 1], [1] * 8),
    }
    for field, columns in expected.items():
        np.testing.assert_array_equal(getattr(schedule.tables, field), np.transpose(columns), err_msg=field)
    assert (schedule.stash_slots, schedule.forward_slots, schedule.backward_slots) == ((2, 1), (0, 1), (1, 0))


# The tables alone, followed by a machine that knows nothing else


class Buffer:
    """Slots that refuse to be overwritten before they are read, and to be read when empty."""

    def __init__(self, slots: int) -> None:
        self.slots = [None] * slots

    def put(self, slot: int, value: tuple) -> None:
        assert self.slots[slot] is None, f"{value} overwrites {self.slots[slot]}"
        self.slots[slot] = value

    def take(self, slot: int) -> tuple:
        value, self.slots[slot] = self.slots[slot], None
        return value


def follow(schedule: Schedule) -> list[tuple[int, int, int]]:
    """Runs the tables; asserts that every read finds what it must; gives (operation, microbatch, segment) as run."""
    stages, last = schedule.stages, schedule.stages * schedule.virtual - 1
    stash, forward, backward = (
        [Buffer(slots) for slots in counts]
        for counts in (schedule.stash_slots, schedule.forward_slots, schedule.backward_slots)
    )
    lengths = max(schedule.forward_slots), max(schedule.backward_slots)
    done = []
    for t in range(schedule.ticks):
        sent = {}  # (receiving stage, direction): what
        for stage in range(stages):
            row = schedule.tables._make(int(table[t, stage]) for table in schedule.tables)
            segment = row.chunk * stages + stage
            if row.operation == FORWARD:
                if segment > 0:
                    assert forward[stage].take(row.forward_inbox) == (row.microbatch, segment)
                else:
                    assert row.forward_inbox == lengths[0]
                stash[stage].put(row.stash, (row.microbatch, segment))
            elif row.operation == BACKWARD:
                if segment < last:
                    assert backward[stage].take(row.backward_inbox) == (row.microbatch, segment)
                else:
                    assert row.backward_inbox == lengths[1]
                assert stash[stage].take(row.stash) == (row.microbatch, segment)
            else:
                assert row.stash == max(schedule.stash_slots)
            if row.operation != IDLE:
                done.append((row.operation, row.microbatch, segment))
            if row.send:
                assert row.send == {FORWARD: 1, BACKWARD: -1}[row.operation]
                sent[(stage + row.send) % stages, row.send] = (row.microbatch, segment + row.send)
        for stage in range(stages):
            for direction, inbox, table, none in (
                (1, forward, schedule.tables.forward_lands, lengths[0]),
                (-1, backward, schedule.tables.backward_lands, lengths[1]),
            ):
                slot, arrived = int(table[t, stage]), sent.pop((stage, direction), None)
                assert (slot == none) == (arrived is None)
                if arrived is not None:
                    inbox[stage].put(slot, arrived)
        assert not sent
    assert not any(slot for buffer in stash + forward + backward for slot in buffer.slots), "something was never read"
    return done


@given(schedules())
def test_the_tables_alone_run_every_pass_once_on_what_it_needs(schedule: Schedule):
    passes = itertools.product(
        (FORWARD, BACKWARD), range(schedule.microbatches), range(schedule.stages * schedule.virtual)
    )
    assert sorted(follow(schedule)) == sorted(passes)


@given(schedules())
def test_tables_are_int32_of_one_shape(schedule: Schedule):
    for table in schedule.tables:
        assert table.dtype == np.int32
        assert table.shape == (schedule.ticks, schedule.stages)


@given(schedules())
def test_the_stash_has_as_many_slots_as_are_in_flight(schedule: Schedule):
    assert schedule.stash_slots == schedule.in_flight


# Formulas


@given(schedules())
def test_the_bubble_is_exactly_the_formula(schedule: Schedule):
    """Section 2.2 of arXiv:2104.04473, of passes of one tick and of backward passes of two."""
    formula = Fraction(schedule.stages - 1, schedule.virtual * schedule.microbatches)
    assert schedule.bubble == formula
    end = max(Fraction(work.end) for work in timeline(schedule, forward=1, backward=2))
    assert end / (3 * schedule.virtual * schedule.microbatches) - 1 == formula


@pytest.mark.parametrize(("stages", "microbatches", "virtual", "bubble"), [(35, 280, 3, 0.0405), (64, 512, 1, 0.1230)])
def test_the_bubble_of_published_runs(stages: int, microbatches: int, virtual: int, bubble: float):
    """530B, interleaved, and 1T, not, of table 1 of arXiv:2104.04473."""
    kind = "interleaved" if virtual > 1 else "1f1b"
    assert float(made(kind, stages, microbatches, virtual).bubble) == pytest.approx(bubble, abs=5e-5)


@given(schedules(kinds=("gpipe",)))
def test_gpipe_holds_every_microbatch(schedule: Schedule):
    assert schedule.in_flight == (schedule.microbatches,) * schedule.stages


@given(schedules(kinds=("1f1b",)))
def test_1f1b_holds_as_many_microbatches_as_stages_are_left(schedule: Schedule):
    left = (schedule.stages - stage for stage in range(schedule.stages))
    assert schedule.in_flight == tuple(min(n, schedule.microbatches) for n in left)


@given(schedules(kinds=("interleaved",)))
def test_interleaved_holds_its_warm_up_and_one(schedule: Schedule):
    stages, virtual = schedule.stages, schedule.virtual
    total = schedule.microbatches * virtual
    for stage, held in enumerate(schedule.in_flight):
        after = stages - stage - 1
        assert held == min(total, 1 + (after if virtual == 1 else 2 * after + (virtual - 1) * stages))


def test_the_first_interleaved_stage_holds_what_the_paper_says():
    """arXiv:2205.05198, section 4.2.3: 1 + (p - 1)/(p v) times the p microbatches of 1f1b."""
    held = made("interleaved", 4, 16, virtual=3).in_flight[0]
    assert Fraction(held, 3) == 4 * (1 + Fraction(3, 4 * 3))


@pytest.mark.parametrize(("kind", "virtual"), [("1f1b", 1), ("eager_1f1b", 1), ("interleaved", 3)])
def test_buffers_do_not_grow_with_microbatches(kind: str, virtual: int):
    few, many = (made(kind, 4, microbatches, virtual) for microbatches in (8, 32))
    for field in ("stash_slots", "forward_slots", "backward_slots"):
        assert getattr(few, field) == getattr(many, field)


@given(schedules())
def test_one_slot_of_each_inbox_is_enough(schedule: Schedule):
    """None on the first stage of a single chunk for what comes forward, nor on the last for what comes back."""
    first = (0 if schedule.virtual == 1 else 1,)
    assert schedule.forward_slots == first + (1,) * (schedule.stages - 1)
    assert schedule.backward_slots == (1,) * (schedule.stages - 1) + first


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", 4, 8), "PlanConfig.schedule is 'dualpipe'; expected one of gpipe, 1f1b, eager_1f1b, interleaved"),
        (
            ("interleaved", 4, 10, 2),
            "PlanConfig.microbatches is 10; expected a multiple of stage = 4 for the schedule interleaved, the nearest "
            "being 8 or 12",
        ),
        (
            ("interleaved", 4, 3, 2),
            "PlanConfig.microbatches is 3; expected a multiple of stage = 4 for the schedule interleaved, the nearest "
            "being 4",
        ),
        (
            ("1f1b", 4, 8, 2),
            "PlanConfig.schedule is '1f1b'; expected interleaved for 2 chunks per stage, or one chunk per stage",
        ),
    ],
)
def test_refusals(arguments: tuple, message: str):
    with pytest.raises(ConfigError) as error:
        made(*arguments)
    assert str(error.value) == message


# Segments of a pattern

COST = {"M": 2.0, "*": 5.0, "E": 3.0, "-": 1.0, "m": 0.0}


def split(pattern: str, count: int, **outer: float) -> tuple[str, ...]:
    return segments(parse_pattern(pattern), count, COST.__getitem__, **outer)


def test_a_written_split_is_kept():
    assert split("M|E*||-M/*E", 4) == ("M", "E*", "", "-M")


def test_a_written_split_into_another_number_is_refused():
    message = r"^ModelConfig.pattern is 'M\|E\*', of 2 segments; expected 4, stages times chunks per stage, or no"
    with pytest.raises(ConfigError, match=message):
        split("M|E*", 4)


def test_balanced_by_cost():
    assert split("MM*E-*EEM", 3) == ("MM*", "E-*", "EEM")  # 9, 9 and 8
    assert split("*MMMMM--", 3) == ("*", "MMM", "MM--")  # 5, 6 and 6
    assert split("*-*E--", 3) == ("*", "-*", "E--")  # 6 bounds: 6, 5 and 5 and 5, 6 and 5 are as even


def test_the_embedding_and_the_head_take_layers_away():
    assert split("MMMMMM", 3) == ("MM", "MM", "MM")
    assert split("MMMMMM", 3, last=4.0) == ("MM", "MMM", "M")
    assert split("MMMMMM", 3, first=6.0) == ("", "MMM", "MMM")
    assert split("MM", 2, last=7.0) == ("MM", "")


def test_more_segments_than_layers():
    found = split("M*", 4)
    assert "".join(found) == "M*" and sorted(found) == ["", "", "*", "M"]


def test_one_segment_is_the_whole():
    assert split("M*E", 1, first=1.0, last=1.0) == ("M*E",)


@given(
    st.text("M*E-m", min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from((0.0, 1.0, 4.5)),
    st.sampled_from((0.0, 2.0, 7.5)),
)
def test_no_other_split_is_more_even(pattern: str, count: int, first: float, last: float):
    """Against every split there is: the least maximum, and among those the least sum of squares."""

    def score(ends: tuple[int, ...]) -> tuple[float, float]:
        bounds = [0, *ends, len(pattern)]
        costs = [sum(COST[c] for c in pattern[a:b]) for a, b in itertools.pairwise(bounds)]
        costs[0] += first
        costs[-1] += last
        return max(costs), sum(c * c for c in costs)

    found = split(pattern, count, first=first, last=last)
    assert "".join(found) == pattern and len(found) == count
    ends = tuple(itertools.accumulate(map(len, found)))[:-1]
    splits = itertools.combinations_with_replacement(range(len(pattern) + 1), count - 1)
    assert score(ends) == min(map(score, splits))


def test_an_even_split_is_not_lost_to_the_last_bit():
    """0.2 + 0.7 and 0.7 + 0.2 bound both splits, but as differences of running sums they are not the same number."""
    found = segments(parse_pattern("--**-*"), 4, {"-": 0.7, "*": 0.2}.__getitem__)
    assert found == ("-", "-", "**", "-*")  # not - | -* | *- | *
