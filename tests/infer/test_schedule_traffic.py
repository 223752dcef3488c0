"""The scheduler under random traffic."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.infer.scheduled import KINDS, Engine, capacity

from orogen.config.checks import ConfigError
from orogen.infer.request import Full


class Traffic(RuleBasedStateMachine):
    """Requests that come, go on, end and are cancelled whenever they can be."""

    @initialize(
        kind=st.sampled_from(KINDS), ranks=st.integers(1, 2), pages=st.integers(9, 20), snapshots=st.integers(0, 3),
        lookahead=st.integers(0, 2), drafts=st.integers(0, 3), every=st.sampled_from([0, 4, 8]), reuse=st.booleans(),
    )  # fmt: skip
    def start(self, kind, every, **sizes):
        sizes["reuse"] = sizes["reuse"] or sizes["ranks"] == 1  # the rarer of the two cases
        self.engine = Engine(capacity(kind, snapshot_every=every, **sizes))

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        repeat=st.integers(1, 3), max_tokens=st.integers(1, 6), priority=st.sampled_from([0, 0, -1, 1]),
        salt=st.sampled_from(["", "", "x"]),
    )  # fmt: skip
    def submit(self, prompt, repeat, max_tokens, priority, salt):
        room, waiting = self.engine.room, len(self.engine.waiting)
        need = -(-(len(prompt) + max_tokens + room.drafts) // room.page)
        for i in range(repeat):
            error = ConfigError if need > room.pages > 0 else Full if waiting + i >= room.queue else None
            if error is None:
                self.engine.submit(prompt, max_tokens=max_tokens, priority=priority, salt=salt)
            else:
                with pytest.raises(error):
                    self.engine.submit(prompt, max_tokens=max_tokens, priority=priority, salt=salt)

    @rule(data=st.data())
    def round(self, data):
        """Pieces are carried out in order, and any request may be cancelled between two of them."""
        plan = self.engine.plan()
        for piece in plan.pieces:
            if piece.slot in self.engine.running:
                self.engine.prefill(piece.slot)
            if data.draw(st.integers(0, 9)) == 0:
                self.cancel(data)
        for slot in plan.decoding:
            if slot in self.engine.running and data.draw(st.booleans()):
                most = self.engine.running[slot]["left"] - 1
                self.engine.finish(slot, tuple(data.draw(st.lists(st.integers(0, 1), max_size=most))))

    @precondition(lambda self: self.engine.waiting or self.engine.running)
    @rule(data=st.data())
    def cancel(self, data):
        slots = {job["number"]: slot for slot, job in self.engine.running.items()}
        numbers = sorted([*self.engine.waiting, *slots])
        if not numbers:
            return
        number = data.draw(st.sampled_from(numbers))
        assert self.engine.scheduler.cancel(number) == slots.get(number)
        self.engine.waiting.pop(number, None)
        self.engine.running.pop(slots.get(number, -1), None)
        with pytest.raises(KeyError):
            self.engine.scheduler.cancel(number)

    @invariant()
    def counts_agree(self):
        if hasattr(self, "engine"):
            scheduler = self.engine.scheduler
            assert scheduler.queued == len(self.engine.waiting)
            assert scheduler.running == {slot: job["number"] for slot, job in self.engine.running.items()}
            assert scheduler.busy == bool(self.engine.waiting or self.engine.running)

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()
            self.engine.nothing_is_lost()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
