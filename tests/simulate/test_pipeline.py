"""A pipeline's step from its table, played whole or by its period."""

import numpy as np
import pytest

from orogen.parallel.schedule import make_schedule
from orogen.simulate.pipeline import expected_flight, play

SHAPES = [("1f1b", 4, 1, 45), ("gpipe", 3, 1, 40), ("interleaved", 4, 2, 48), ("interleaved", 2, 3, 40)]


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize(("kind", "stages", "virtual", "microbatches"), SHAPES)
def test_a_table_extended_by_its_period_takes_as_long_as_the_whole_one(kind, stages, virtual, microbatches, lockstep):
    random = np.random.default_rng(0)
    costs = random.uniform(1, 3, (2, virtual, stages))
    whole, short = (play(kind, *costs, microbatches, hop=0.25, lockstep=lockstep, most=most) for most in (10**6, 10))
    assert short.played < microbatches == whole.played
    assert short.seconds == pytest.approx(whole.seconds, rel=2e-2)
    assert short.flight == whole.flight


@pytest.mark.parametrize(("kind", "stages", "virtual", "microbatches"), [*SHAPES, ("1f1b", 5, 1, 3), ("1f1b", 1, 1, 4)])
def test_what_is_expected_in_flight_is_what_the_tables_have(kind, stages, virtual, microbatches):
    schedule = make_schedule(kind, stages=stages, microbatches=microbatches, virtual=virtual)
    found = expected_flight(kind, stages, microbatches, virtual).in_flight
    assert all(0 <= guess - exact <= 1 for guess, exact in zip(found, schedule.in_flight, strict=True))


def test_the_bubble_of_equal_stages_is_that_of_the_papers():
    """(p - 1) / (v m): arXiv:2104.04473, section 2.2."""
    for kind, virtual in (("1f1b", 1), ("interleaved", 2)):
        forward = np.full((virtual, 8), 1.0)
        found = play(kind, forward, 2 * forward, 16, hop=0.0, lockstep=False)
        assert found.seconds / (16 * 3 * virtual) - 1 == pytest.approx(7 / (virtual * 16))
