"""The scheduler by hand."""

import pytest
from tests.infer.scheduled import KINDS, Engine, capacity

from orogen.config.checks import ConfigError
from orogen.infer.capacity import Capacity
from orogen.infer.request import Full, Request
from orogen.infer.schedule import Piece, Scheduler


def test_pieces_end_at_borders_and_share_a_round():
    engine = Engine(capacity(pages=40, reuse=False))
    engine.submit(range(10))
    engine.submit(range(7))
    engine.submit(range(2))
    pieces = [[(p.slot, p.start, p.count, p.last) for p in engine.step().pieces] for _ in range(3)]
    # 8 tokens a round; 2 of the third fit behind the second's 4, of which 3 more do not end at a border.
    assert pieces == [[(0, 0, 8, False)], [(0, 8, 2, True), (1, 0, 4, False), (2, 0, 2, True)], [(1, 4, 3, True)]]
    assert engine.step().decoding == (0, 1, 2)


def test_decoding_slots_are_in_every_round():
    engine = Engine(capacity(pages=60))
    engine.submit(range(3))
    engine.step()
    engine.submit(range(50, 98))
    for _ in range(6):
        plan = engine.step()
        assert plan.decoding == (0,) and plan.pieces[0].count == 8


def test_the_first_of_the_queue_waits_for_room_and_is_not_passed():
    engine = Engine(capacity(reuse=False))
    small, large = engine.submit(range(18)), engine.submit(range(20))
    engine.submit(range(1))  # there would be room for it
    assert [a.number for a in engine.step().admitted] == [small]
    for _ in range(3):
        assert engine.step().admitted == ()
    engine.finish(0)
    assert [a.number for a in engine.step().admitted] == [large, 2]


def test_priority_goes_before_arrival():
    engine = Engine(capacity(slots=1))
    numbers = [engine.submit([i], priority=p) for i, p in enumerate((1, 0, -5, 0))]
    order = []
    while engine.scheduler.busy:
        order += [a.number for a in engine.step(finish=True).admitted]
    assert order == [numbers[i] for i in (2, 1, 3, 0)]


def test_what_the_cache_holds_gives_way():
    engine = Engine(capacity())
    engine.submit(range(24))
    engine.drain()
    prefix = engine.scheduler.ranks[0].prefix
    assert prefix is not None and prefix.evictable_pages == 12
    engine.submit(range(50, 74))
    engine.drain()
    assert prefix.match(tuple(range(24))).length < 8 and prefix.match(tuple(range(50, 74))).length == 22


@pytest.mark.parametrize(("kind", "hit"), [("attention", 8), ("hybrid", 8), ("recurrent", 8)])
def test_samples_of_one_prompt_read_it_once(kind, hit):
    """The first reads it while the others wait; another prompt behind them gets its turn."""
    engine = Engine(capacity(kind, pages=40))
    for prompt in (range(10), range(10), range(10), [7, 7]):
        engine.submit(prompt)
    lengths, rounds = {}, 0
    while len(lengths) < 4:
        lengths |= {a.number: a.length for a in engine.step().admitted}
        rounds += 1
    assert lengths == {0: 0, 1: hit, 2: hit, 3: 0} and rounds <= 3
    engine.drain()
    engine.nothing_is_lost()


def test_a_snapshot_is_taken_where_prompts_part():
    """The third of three prompts with a common beginning goes on from its end; the first could not know where."""
    engine = Engine(capacity("hybrid", pages=60, prefill_tokens=64))
    hits = []
    for tail in range(3):
        engine.submit([*range(100, 109), *[tail] * 9])
        hits += [a.length for a in engine.plan().admitted]
        for slot, job in list(engine.running.items()):
            while job["done"] < len(job["prompt"]):
                engine.prefill(slot) if job["piece"] else engine.plan()
            engine.finish(slot)
    assert hits == [0, 0, 8]


def test_a_prompt_is_read_at_once_where_its_last_border_is_not_saved():
    engine = Engine(capacity("hybrid", snapshot_last=False))
    engine.submit(range(7))
    assert engine.step().pieces == (Piece(0, 0, 7, True, None),)


def test_an_answer_is_part_of_the_next_prompt():
    for kind, hit in (("attention", 10), ("hybrid", 8), ("recurrent", 8)):
        engine = Engine(capacity(kind))
        engine.submit(range(5), max_tokens=6)
        while not engine.step().decoding:
            pass
        engine.finish(0, (5, 6, 7, 8, 9))
        engine.submit(range(12))
        assert [a.length for a in engine.step().admitted] == [hit], kind


def test_ranks_have_memory_of_their_own():
    engine = Engine(capacity("hybrid", ranks=2))
    for start in (0, 100, 200, 300):
        engine.submit(range(start, start + 8))
    plan = engine.step()
    assert [a.slot for a in plan.admitted] == [0, 2, 1, 3]
    assert set(plan.admitted[0].pages) == set(plan.admitted[1].pages)
    assert {p.slot: p.count for p in plan.pieces} == {0: 4, 1: 4, 2: 4, 3: 4}
    assert {p.slot: p.row for p in plan.pieces} == {0: 0, 1: 1, 2: 0, 3: 1}
    engine.drain()
    engine.nothing_is_lost()


def test_what_can_never_fit_is_refused_at_once():
    scheduler = Scheduler(capacity(drafts=3))
    assert scheduler.submit(Request(prompt=(1,) * 20, max_tokens=9)) == 0
    with pytest.raises(ConfigError) as error:
        scheduler.submit(Request(prompt=(1,) * 20, max_tokens=10))
    assert str(error.value) == (
        "a prompt of 20 tokens and max_tokens=10 need 17 pages of 2 tokens; expected at most 16, for 29 tokens in all"
    )
    assert scheduler.queued == 1
    with pytest.raises(ConfigError, match="need 4 pages of 2 tokens; expected at most 3, for 6 tokens in all"):
        Scheduler(capacity(reach=3)).submit(Request(prompt=(1,) * 6, max_tokens=1))


def test_a_full_queue_says_so_until_somebody_leaves():
    scheduler = Scheduler(capacity(queue=2))
    numbers = [scheduler.submit(Request(prompt=(1,), max_tokens=1)) for _ in range(2)]
    with pytest.raises(Full, match="2 requests wait; expected fewer than 2"):
        scheduler.submit(Request(prompt=(1,), max_tokens=1))
    assert scheduler.cancel(numbers[0]) is None
    assert scheduler.submit(Request(prompt=(1,), max_tokens=1)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_ends_between_plan_and_report_returns_everything(kind):
    engine = Engine(capacity(kind))
    number = engine.submit(range(10))
    piece = engine.plan().pieces[0]
    assert (piece.row is None) == (kind in ("attention", "plain"))
    assert engine.scheduler.cancel(number) == 0
    (rank,) = engine.scheduler.ranks
    assert all(pool is None or pool.free == pool.count for pool in (rank.pages, rank.snapshots))
    assert not engine.scheduler.busy and engine.scheduler.round() == ((), (), ())


def test_a_request_that_finds_no_room_holds_nothing_while_it_waits():
    engine = Engine(capacity())
    engine.submit(range(10), max_tokens=1)
    engine.drain()  # leaves 5 pages in the cache
    engine.submit(range(50, 64), max_tokens=6)
    engine.step()
    engine.submit(range(11), max_tokens=15)  # of its 13 pages 5 are cached, and 6 are left
    assert engine.step().admitted == ()
    (rank,) = engine.scheduler.ranks
    assert rank.prefix is not None and rank.prefix.evictable_pages == 5
    engine.drain()
    engine.nothing_is_lost()


def test_only_a_later_state_than_those_known_is_kept():
    for border, row in ((None, None), (4, None), (8, None), (12, 1)):
        engine = Engine(capacity("hybrid"))
        engine.submit(range(9), max_tokens=6)
        while not engine.step().decoding:
            pass
        assert engine.scheduler.finished(0, committed=(9, 10, 11), border=border) == row
        (rank,) = engine.scheduler.ranks
        assert rank.snapshots is not None and rank.snapshots.free == 3 - (row is not None)


def test_an_answer_that_is_known_is_not_kept_twice():
    engine = Engine(capacity("hybrid"))
    free = []
    for _ in range(2):
        engine.submit(range(9), max_tokens=6)
        while not engine.step().decoding:
            pass
        engine.finish(0, (9, 10, 11))
        free.append(engine.scheduler.ranks[0].snapshots.free)
    assert free == [2, 2] and engine.scheduler.ranks[0].prefix.take_row() in (2, 3)


def test_an_answer_is_not_kept_where_every_row_is_being_read():
    engine = Engine(capacity("hybrid", snapshots=1))
    engine.submit([50], max_tokens=7)
    engine.step()
    engine.submit(range(5))
    while 1 not in engine.step().decoding:
        pass
    engine.finish(1)
    engine.submit(range(6))
    assert [a.row for a in engine.plan().admitted] == [0]
    assert engine.scheduler.finished(0, committed=range(51, 57), border=4) is None


def test_nobody_waits_for_a_prompt_of_lower_rank():
    engine = Engine(capacity(pages=40))
    engine.submit(range(30), priority=1)
    engine.step()
    engine.submit(range(30))
    plan = engine.step()
    assert [(a.number, a.length) for a in plan.admitted] == [(1, 8)] and plan.pieces[0].slot == 1


@pytest.mark.parametrize(("lookahead", "ends"), [(0, [8, 9]), (1, [8, 9]), (2, [4, 9]), (6, [8, 9])])
def test_a_snapshot_needs_the_tokens_that_are_looked_ahead_to(lookahead, ends):
    engine = Engine(capacity("hybrid", lookahead=lookahead))
    engine.submit(range(9))
    pieces = [engine.step().pieces[0] for _ in range(2)]
    assert [p.start + p.count for p in pieces] == ends
    assert [p.row for p in pieces] == [None if lookahead == 6 else 0, None]
    engine.drain()
    engine.nothing_is_lost()


def test_a_request_goes_where_its_prompt_is_read_first():
    engine = Engine(capacity(ranks=2))
    engine.submit(range(12), max_tokens=1)
    engine.submit(range(50, 51), max_tokens=16)  # the other rank has fewer pages left, and nothing left to read
    assert [a.slot for a in engine.step().admitted] == [0, 2]
    engine.submit(range(70, 72))
    assert [a.slot for a in engine.step().admitted] == [3]


def test_reports_of_what_was_not_planned_are_refused():
    engine = Engine(capacity())
    engine.submit(range(10))
    engine.plan()
    for call, message in (
        (lambda: engine.scheduler.round(), "slot 0 has not reported Piece"),
        (lambda: engine.scheduler.prefilled(0, 7), "slot 0 reports a piece of 7 tokens; expected Piece"),
        (lambda: engine.scheduler.prefilled(3, 8), r"slot 3 has no request; expected one of \[0\]"),
        (lambda: engine.scheduler.finished(1), "slot 1 has no request"),
        (lambda: engine.scheduler.finished(0, committed=[1]), "1 generated tokens after 0 of 10 of its prompt"),
        (lambda: engine.scheduler.finished(0, border=6), "state after 6 of 10 tokens; expected a multiple of chunk=4"),
        (lambda: engine.scheduler.finished(0, border=12), "state after 12 of 10 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": 3, "ranks": 2}, "Capacity.slots is 3; expected a multiple of ranks=2"),
        ({"chunk": 5}, "Capacity.chunk is 5; expected a multiple of page=2"),
        ({"prefill_tokens": 3}, "Capacity.prefill_tokens is 3; expected at least chunk=4"),
        ({"snapshot_every": 6}, "Capacity.snapshot_every is 6; expected a multiple of chunk=4"),
        ({"queue": 0}, "Capacity.queue is 0; expected 1 or more"),
        ({"reach": 17}, "Capacity.reach is 17; expected 1 to pages=16"),
        ({"drafts": -1}, "Capacity.drafts is -1; expected 0 or more"),
    ],
)
def test_impossible_capacities_are_refused(changes, message):
    with pytest.raises(ConfigError) as error:
        capacity(**changes)
    assert str(error.value) == message


def test_a_model_without_recurrent_layers_has_no_snapshots():
    with pytest.raises(ConfigError, match="snapshots is 1; expected 0, since recurrent=False"):
        Capacity(slots=1, page=1, pages=1, recurrent=False, snapshots=1, chunk=1, prefill_tokens=1, queue=1)
