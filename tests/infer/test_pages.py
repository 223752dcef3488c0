"""Reference counts of pages, against a machine that draws what happens to them."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orogen.infer.pages import Pages, Pool

COUNT = 7


class Holders(RuleBasedStateMachine):
    """Somebody who keeps his own list of what he holds."""

    def __init__(self):
        super().__init__()
        self.pool, self.held = Pages(COUNT, page=4), Counter[int]()

    @rule(count=st.integers(0, COUNT + 1))
    def take(self, count):
        taken = self.pool.take(count)
        if count > COUNT - len(self.held):
            assert taken is None
        else:
            assert taken is not None and len(set(taken)) == count and not self.held.keys() & set(taken)
            self.held.update(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hold(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held))))
        self.pool.hold(ids)
        self.held.update(ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held.elements()))).map(Counter))
        ids &= self.held
        self.pool.drop(ids.elements())
        self.held -= ids

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop_once_too_often(self, data):
        """Refused whole: those that could be dropped stay, too."""
        one = data.draw(st.sampled_from(sorted(self.held)))
        with pytest.raises(ValueError, match=f"page {one} .* at most as many"):
            self.pool.drop([*self.held, *[one] * self.held[one]])

    @precondition(lambda self: len(self.held) < COUNT)
    @rule(data=st.data())
    def touch_a_free_one(self, data):
        one = data.draw(st.sampled_from(sorted(set(range(COUNT)) - self.held.keys())))
        with pytest.raises(ValueError, match=f"page {one}, which is free"):
            self.pool.hold([*self.held, one])
        with pytest.raises(ValueError, match=f"drops page {one} 1 times, held 0 times"):
            self.pool.drop([one])

    @invariant()
    def counts_agree(self):
        assert [self.pool.holders(i) for i in range(COUNT)] == [self.held[i] for i in range(COUNT)]
        assert self.pool.free == COUNT - len(self.held)


TestHolders = Holders.TestCase
TestHolders.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_what_does_not_exist_is_refused():
    pool = Pool(3, what="row")
    for call in (pool.hold, pool.drop):
        for one in (-1, 3):
            with pytest.raises(ValueError, match=f"row {one}; expected one from 0 to 2"):
                call([one])
    with pytest.raises(ValueError, match="takes -1 rows"):
        pool.take(-1)
    with pytest.raises(ValueError, match="-1 rows"):
        Pool(-1)
    with pytest.raises(ValueError, match="pages of 0 tokens"):
        Pages(3, page=0)


def test_a_pool_of_nothing_gives_nothing():
    assert Pool(0).take(0) == () and Pool(0).take(1) is None
