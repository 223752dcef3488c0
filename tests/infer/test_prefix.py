"""The prefix cache by hand, and against a device that remembers what was written to each page and row."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orogen.infer.pages import Pages, Pool
from orogen.infer.prefix import Lock, Prefix

PAGE, BORDER = 2, 4
KINDS = "attention", "recurrent", "hybrid"


def made(kind: str, *, pages: int = 20, rows: int = 6, lookahead: int = 0) -> tuple[Prefix, Pages | None, Pool | None]:
    page_pool = None if kind == "recurrent" else Pages(pages, page=PAGE)
    row_pool = None if kind == "attention" else Pool(rows)
    return Prefix(page_pool, row_pool, border=BORDER, lookahead=lookahead), page_pool, row_pool


class Device:
    """Requests that compute, on pages and rows whose content is what they were computed from."""

    def __init__(self, kind: str, **sizes: int):
        self.prefix, self.pages, self.rows = made(kind, **sizes)
        self.lookahead = sizes.get("lookahead", 0)
        self.page_content: dict[int, object] = {}
        self.row_content: dict[int, object] = {}

    def enter(self, tokens: tuple[int, ...], salt: str = "") -> tuple[Lock, list[int], int] | None:
        """Begins a request, if there are pages for it: its lock, its pages, and the length of its hit."""
        hit = self.prefix.match(tokens, salt=salt)
        assert hit.length < len(tokens) and hit.length <= hit.shared
        self.check(hit, tokens, salt)
        lock = self.prefix.lock(hit)
        own: tuple[int, ...] = ()
        if self.pages is not None:
            need = -(-len(tokens) // PAGE) - len(hit.pages)
            if not self.prefix.evict(pages=need):
                self.prefix.unlock(lock)
                return None
            own = self.pages.take(need) or ()
            assert len(own) == need
            self.pages.hold(hit.pages)
        self.check(hit, tokens, salt)
        for place, page in enumerate(own, len(hit.pages)):
            self.page_content[page] = self.content(tokens, place, salt)
        return lock, [*hit.pages, *own], hit.length

    def content(self, tokens: tuple[int, ...], place: int, salt: str) -> object:
        """What a page of the block at `place` depends on."""
        return salt, tokens[: (place + 1) * PAGE + self.lookahead]

    def check(self, hit, tokens, salt):
        assert [self.page_content[p] for p in hit.pages] == [
            self.content(tokens, i, salt) for i in range(len(hit.pages))
        ]
        assert len(hit.pages) == (0 if self.pages is None else hit.length // PAGE)
        assert (hit.row is None) == (self.rows is None or hit.length == 0)
        assert hit.row is None or self.row_content[hit.row] == (salt, tokens[: hit.length])

    def insert(self, lock: Lock, pages: list[int], tokens: tuple[int, ...], length: int, salt: str = "") -> bool:
        """Whether it could: a recurrent model's needs a row."""
        row = None
        if self.rows is not None:
            row = self.prefix.take_row()
            if row is None:
                return False
            self.row_content[row] = (salt, tokens[:length])
        self.prefix.insert(lock, tokens, length, pages=pages, row=row)
        assert lock.length == length
        return True

    def leave(self, lock: Lock, pages: list[int]) -> None:
        self.prefix.unlock(lock)
        if self.pages is not None:
            self.pages.drop(pages)

    def run(self, tokens: tuple[int, ...], *lengths: int, salt: str = "") -> int:
        """A whole request, inserted at these lengths: the length of its hit."""
        entered = self.enter(tokens, salt)
        assert entered is not None
        lock, pages, length = entered
        for one in lengths:
            if one > length:
                assert self.insert(lock, pages, tokens, one, salt)
        self.leave(lock, pages)
        return length


class Requests(RuleBasedStateMachine):
    """Requests over two tokens, so that they share much, in less memory than they want."""

    @initialize(kind=st.sampled_from(KINDS), lookahead=st.integers(0, 3), pages=st.integers(5, 12))
    def start(self, kind, lookahead, pages):
        self.device = Device(kind, lookahead=lookahead, pages=pages, rows=3)
        self.prefix, self.lookahead = self.device.prefix, lookahead
        self.open: list[dict] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16).map(tuple), salt=st.sampled_from(["", "x"]))
    def enter(self, tokens, salt):
        entered = self.device.enter(tokens, salt)
        if entered is not None:
            lock, pages, length = entered
            reading = self.prefix.match(tokens, salt=salt).row if length else None
            self.open.append(
                {"lock": lock, "pages": pages, "tokens": tokens, "salt": salt, "reads": reading, "at": length}
            )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def insert(self, data):
        one = data.draw(st.sampled_from(self.open))
        step = BORDER if self.device.rows is not None else PAGE
        end = len(one["tokens"]) - self.lookahead
        lengths = [n for n in range(step, end + 1, step) if n > one["lock"].length]
        if lengths:
            self.device.insert(
                one["lock"], one["pages"], one["tokens"], data.draw(st.sampled_from(lengths)), one["salt"]
            )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def copied(self, data):
        one = data.draw(st.sampled_from(self.open))
        self.prefix.copied(one["lock"])
        one["reads"] = None

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data):
        one = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.device.leave(one["lock"], one["pages"])
        with pytest.raises(ValueError, match="after it was unlocked"):
            self.prefix.unlock(one["lock"])

    @rule(pages=st.integers(0, 13), rows=st.integers(0, 4))
    def evict(self, pages, rows):
        pools = self.device.pages, self.device.rows
        before = [p.free if p else 0 for p in pools]
        possible = before[0] + self.prefix.evictable_pages >= pages and (
            before[1] + self.prefix.evictable_snapshots >= rows
        )
        assert self.prefix.evict(pages=pages, snapshots=rows) == possible
        after = [p.free if p else 0 for p in pools]
        assert (after[0] >= pages and after[1] >= rows) if possible else after == before

    @rule()
    def row_to_write(self):
        """Never one that is read."""
        if (row := self.prefix.take_row()) is not None:
            assert row not in [one["reads"] for one in self.open]
            self.device.rows.drop([row])

    @invariant()
    def open_requests_keep_their_memory(self):
        for one in self.open:
            for place, page in enumerate(one["pages"]):
                content = self.device.content(one["tokens"], place, one["salt"])
                assert self.device.page_content[page] == content and self.device.pages.holders(page) >= 1
            if one["reads"] is not None:
                assert self.device.row_content[one["reads"]] == (one["salt"], one["tokens"][: one["at"]])
                assert self.device.rows.holders(one["reads"]) == 1

    @invariant()
    def everything_is_free_held_or_evictable(self):
        """Without requests, all that is not free can be evicted."""
        if not self.open and hasattr(self, "device"):
            for pool, evictable in (
                (self.device.pages, self.prefix.evictable_pages), (self.device.rows, self.prefix.evictable_snapshots),
            ):  # fmt: skip
                assert pool is None or pool.free + evictable == pool.count

    def teardown(self):
        if not hasattr(self, "device"):
            return
        for one in self.open:
            self.device.leave(one["lock"], one["pages"])
        rows = self.device.rows
        if rows is not None:  # nodes that end in no snapshot go with the last one
            assert self.prefix.evict(snapshots=rows.count)
        self.prefix.clear()
        assert all(pool is None or pool.free == pool.count for pool in (self.device.pages, rows))
        assert self.prefix.match((0, 0, 0, 0, 0)).shared == 0


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


PROMPT = tuple(range(10, 21))


@pytest.mark.parametrize(
    ("kind", "lengths", "hit"), [("attention", [8], 10), ("hybrid", [4, 8], 8), ("recurrent", [4, 8], 8)]
)
def test_a_hit_ends_where_a_model_can_go_on(kind, lengths, hit):
    device = Device(kind)
    assert device.run(PROMPT, *lengths) == 0
    assert device.run(PROMPT[:9] + (0, 0, 0)) == 8
    assert device.run(PROMPT[:6] + (0, 0, 0)) == (6 if kind == "attention" else 4)
    assert device.run(PROMPT, *([10] if kind == "attention" else [])) == 8
    assert device.run(PROMPT) == hit


@pytest.mark.parametrize("kind", KINDS)
def test_at_least_one_token_is_left_to_compute(kind):
    device = Device(kind)
    device.run(PROMPT[:9], 4, 8)
    assert device.run(PROMPT[:8]) == (6 if kind == "attention" else 4)
    assert device.run(PROMPT[:9]) == 8
    assert device.run(PROMPT[:1]) == 0


def test_shared_tokens_beyond_the_last_snapshot_are_told():
    device = Device("hybrid")
    device.run(PROMPT, 8)  # without a snapshot at 4
    hit = device.prefix.match(PROMPT[:7])
    assert (hit.length, hit.shared, hit.pages, hit.row) == (0, 6, (), None)


def test_a_salt_keeps_requests_apart():
    device = Device("hybrid")
    device.run(PROMPT, 8, salt="mine")
    assert [device.run(PROMPT, salt=salt) for salt in ("", "yours", "mine")] == [0, 0, 8]


def test_tokens_of_equal_hashes_are_told_apart():
    one, other = (-1, 5, 6, 7, 8), (-2, 5, 6, 7, 8)
    assert hash(one) == hash(other)
    device = Device("hybrid")
    device.run(one, 4)
    assert [device.run(other), device.run(one)] == [0, 4]


def test_what_drafts_look_ahead_to_belongs_to_the_key():
    """The page of tokens 0 to 3 depends on tokens 4 and 5 too."""
    device = Device("hybrid", lookahead=2)
    device.run(PROMPT, 4)
    assert device.run(PROMPT[:6]) == 4
    assert device.run(PROMPT[:5]) == 0, "the token after next is not known"
    assert device.run((*PROMPT[:5], 0, 0, 0)) == 0
    assert device.prefix.longest(known=11, computed=11) == 8
    assert device.prefix.longest(known=11, computed=7) == 6
    assert device.prefix.longest(known=1, computed=1) == 0


def test_the_least_recently_used_goes_first_from_its_end():
    device = Device("attention", pages=8)
    first, second = (1, 1, 1, 1, 9), (2, 2, 2, 2, 9)
    device.run(first, 2, 4)
    device.run(second, 2, 4)
    device.run(first)
    assert device.prefix.evict(pages=5)
    assert [device.prefix.match(t).length for t in (first, second)] == [4, 2]
    assert device.prefix.evict(pages=7)
    assert [device.prefix.match(t).length for t in (first, second)] == [2, 0]


def test_an_evicted_snapshot_leaves_its_node_to_those_below():
    device = Device("hybrid")
    device.run(PROMPT, 4, 8)
    device.run(PROMPT[:5], 4)  # the snapshot at 8 is now the older one
    device.run(PROMPT)  # and now that at 4
    assert device.prefix.evict(snapshots=5)
    assert [device.prefix.match(PROMPT[:n]).length for n in (9, 8)] == [8, 0]
    assert device.prefix.match(PROMPT[:8]).shared == 8
    assert device.prefix.evict(snapshots=6)
    assert device.prefix.match(PROMPT).shared == 0 and device.pages.free == 20


def test_a_snapshot_heals_a_node_that_lost_its_own():
    device = Device("hybrid")
    device.run(PROMPT, 8)
    device.run(PROMPT[:7], 4)
    assert device.prefix.match(PROMPT[:7]).length == 4
    assert device.prefix.match(PROMPT).length == 8


def test_of_two_that_computed_the_same_the_first_stays():
    device = Device("hybrid")
    first, second = device.enter(PROMPT), device.enter(PROMPT)
    assert first and second
    assert device.insert(first[0], first[1], PROMPT, 8)
    assert device.prefix.saved(second[0], PROMPT, 8) and not device.prefix.saved(second[0], PROMPT, 4)
    assert not device.prefix.saved(second[0], (*PROMPT, 1), 12), "tokens beyond those known"
    assert device.insert(second[0], second[1], PROMPT, 8)
    assert device.rows.free == 5
    device.leave(*second[:2])
    device.leave(*first[:2])
    assert device.prefix.match(PROMPT).pages == tuple(first[1][:4])
    assert device.pages.free == 16


def test_a_path_that_another_left_behind_is_locked_by_an_insertion():
    device = Device("hybrid")
    entered = device.enter(PROMPT)
    device.run(PROMPT, 4, 8)
    assert device.prefix.evictable_pages == 4
    assert entered and device.insert(*entered[:2], PROMPT, 4)
    assert device.prefix.evictable_pages == 2
    assert not device.prefix.evict(pages=13) and device.prefix.evict(pages=12)
    device.leave(*entered[:2])
    assert device.prefix.match(PROMPT).length == 4


def test_what_is_used_is_not_evicted():
    device = Device("hybrid", pages=6, rows=1)
    entered = device.enter(PROMPT)
    assert entered and device.insert(*entered[:2], PROMPT, 8)
    assert not device.prefix.evict(pages=1) and device.prefix.evictable_pages == 0
    device.leave(*entered[:2])
    lock = device.prefix.lock(device.prefix.match(PROMPT))
    assert device.prefix.take_row() is None, "its only row is being read"
    assert not device.prefix.evict(pages=3)
    with pytest.raises(ValueError, match="that 1 requests use"):
        device.prefix.clear()
    device.prefix.copied(lock)
    assert device.prefix.take_row() == 0
    assert device.prefix.evictable_pages == 0
    device.prefix.unlock(lock)
    assert device.pages.free == 6, "a path that ends in no snapshot is of no use"


def test_a_row_is_read_until_its_last_reader_has_copied_it():
    device = Device("recurrent", rows=1)
    device.run(PROMPT, 4)
    locks = [device.prefix.lock(device.prefix.match(PROMPT)) for _ in range(2)]
    device.prefix.copied(locks[0])
    device.prefix.copied(locks[0])  # the second time changes nothing
    assert device.prefix.take_row() is None
    device.prefix.copied(locks[1])
    assert device.prefix.take_row() == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="neither pages nor snapshots"):
        Prefix(None, None, border=4)
    with pytest.raises(ValueError, match="every 5 tokens; expected a multiple of the page's 2"):
        Prefix(Pages(3, page=2), Pool(1), border=5)
    with pytest.raises(ValueError, match="lookahead=-1"):
        Prefix(Pages(3, page=2), None, border=2, lookahead=-1)
    device = Device("hybrid", lookahead=1)
    entered = device.enter(PROMPT)
    assert entered
    for length, row, pages, message in (
        (5, 0, 6, "inserts 5 of 11 tokens"), (12, 0, 6, "inserts 12 of 11"), (6, 0, 6, "a row, at a multiple of 4"),
        (8, None, 6, "with row None; expected a row"), (8, 0, 3, "3 pages of 2 tokens for 8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            device.prefix.insert(entered[0], PROMPT, length, pages=entered[1][:pages], row=row)
    plain = Device("attention")
    entered = plain.enter(PROMPT)
    assert entered
    with pytest.raises(ValueError, match="expected no row"):
        plain.prefix.insert(entered[0], PROMPT, 4, pages=entered[1], row=0)
