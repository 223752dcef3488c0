"""Which processes are slow."""

import jax
import pytest
from jax.experimental import multihost_utils

from orogen.train.stragglers import Pace, device_seconds, slow


def test_a_slow_process_is_one_far_above_the_median():
    host_p = [0.010, 0.011, 0.030, 0.009, 0.010]
    device_p = [0.004, 0.004, 0.004, 0.004, 0.0200001]
    found = slow({"its host": host_p, "its slowest device": device_p}, 0.3)
    assert found == {
        2: "its host takes 30.0 ms, the median process's 10.0 ms",
        4: "its slowest device takes 20.0 ms, the median process's 4.0 ms",
    }


@pytest.mark.parametrize(
    ("seconds_p", "step", "expected"),
    [
        ([0.1, 0.1, 0.1249], 0.1, []),  # less than a quarter more
        ([0.1, 0.1, 0.1251], 0.1, [2]),
        ([0.001, 0.001, 0.009], 0.2, []),  # a small part of a step
        ([0.001, 0.001, 0.0111], 0.2, [2]),
        ([0.2, 0.1], 0.1, [0]),
        ([0.3], 0.1, []),
    ],
)
def test_the_borders(seconds_p, step, expected):
    assert list(slow({"x": seconds_p}, step)) == expected


def test_one_process_compares_nothing(monkeypatch):
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda *_: pytest.fail("gathers"))
    pace = Pace(pytest.fail)
    pace.add(0.1, 0.01)
    assert pace.compared() == {}


def test_the_times_of_all_processes_are_recorded_and_slow_ones_named(monkeypatch):
    lines = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    others = lambda own: own * [[1.0, 1.0, 1.0], [1.0, 50.0, 1.0], [1.0, 1.0, 1.0]]  # noqa: E731
    monkeypatch.setattr(multihost_utils, "process_allgather", others)
    pace = Pace(lines.append)
    for step, host in ((0.1, 0.02), (0.5, 0.01), (0.2, 0.04)):
        pace.add(step, host)
    record = pace.compared()
    assert record["host_ms"] == pytest.approx([20, 1000, 20])
    assert len(record["device_ms"]) == 3 and min(record["device_ms"]) > 0
    assert record["slow_processes"] == [1]
    assert lines == ["process 1 is slow: its host takes 1000.0 ms, the median process's 20.0 ms"]


def test_devices_are_timed():
    assert 0 < device_seconds() < 30
