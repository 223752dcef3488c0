"""Which steps count as bad."""

import math

from tests.helpers import run_config

from orogen.train.health import Health

TRAIN = run_config(spike_deviations=4.0, spike_window=5).train


def step(loss, *, skipped=0):
    return {"objective": loss, "skipped_steps": skipped}


def test_a_spike_is_above_the_median_by_so_many_deviations():
    """Median 3, absolute deviations 0, 1, 1, 2, 97, their median 1; the outlier 100 counts as any other number."""
    health = Health(TRAIN)
    for loss in (2.0, 100.0, 4.0, 3.0):
        assert "spike_bound" not in health.judged(step(loss))
        assert health.bound is None
    health.judged(step(5.0 - 4.0))
    assert math.isclose(health.bound, 3 + 4 * 1.4826)
    assert "spike_bound" not in health.judged(step(3 + 4 * 1.4826 - 1e-9))


def test_bad_steps_leave_the_bound_and_are_counted_in_a_row():
    health = Health(TRAIN, [step(loss) for loss in (1.0, 2.0, 3.0, 4.0, 5.0)])
    bound = health.bound
    assert health.judged(step(50.0)) == {**step(50.0), "spike_bound": bound} and health.bad_in_row == 1
    health.judged(step(math.nan, skipped=1))
    health.judged(step(2.0, skipped=2))  # skipped for its gradient: the loss is finite
    assert (health.bad_in_row, health.bound) == (3, bound)
    health.judged(step(8.5, skipped=2))
    assert health.bad_in_row == 0 and health.bound != bound


def test_a_resumed_run_judges_as_before():
    losses = [3.0, 1.0, 2.0, 5.0, 4.0, 60.0, 3.5, math.nan, 2.5, 70.0, 70.0]
    skipped = [0] * 7 + [1] * 4
    whole, records = Health(TRAIN), []
    for loss, count in zip(losses, skipped, strict=True):
        records.append(whole.judged(step(loss, skipped=count)))
        again = Health(TRAIN, records)
        assert (again.bound, again.bad_in_row) == (whole.bound, whole.bad_in_row)
    assert [i for i, record in enumerate(records) if "spike_bound" in record] == [5, 9, 10]


def test_without_a_bound_only_skipped_steps_are_bad():
    health = Health(run_config(spike_window=5).train)
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 1e9):
        assert "spike_bound" not in health.judged(step(loss))
    assert health.bad_in_row == 0
