"""Where the time of a run went, worked out by hand."""

import pytest

from orogen.report.goodput import goodput, time_spent
from orogen.report.lost import Lost
from orogen.report.metrics import MetricsWriter
from orogen.report.page import write_report

RECORDS = [
    {"step": 1, "loss": 2.0, "step_ms": 500.0, "start_seconds": 3.0, "compile_seconds": 8.0},
    {"step": 2, "loss": 2.0, "step_ms": 500.0, "evaluate_seconds": 2.0},
    {"step": 3, "loss": 2.0, "step_ms": 4000.0, "save_seconds": 0.5, "start_seconds": 1.0, "compile_seconds": 1.0},
]
LOSSES = [Lost(2, 6, 3.0, "end"), Lost(2, 4, 1.5, "roll_back", {"at": 9}), Lost(0, 1, 0.5, "repeat")]


def test_the_time_is_split():
    spent = time_spent(RECORDS, LOSSES)
    assert list(spent.values()) == pytest.approx([5.0, 4.0, 9.0, 2.0, 0.5, 5.0])
    assert list(spent)[-1] == "lost: 7 steps computed in vain; roll-backs: 1"
    assert goodput(spent) == pytest.approx(5 / 25.5)
    assert list(time_spent(RECORDS, []))[-1] == "lost: 0 steps computed in vain"


def test_metrics_of_earlier_releases_say_nothing():
    assert time_spent([{"step": 1, "step_ms": 3.0}], []) == {}
    assert goodput({}) is None


def test_the_report_has_the_table(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for record in RECORDS:
            writer.write(record)
    page = write_report(tmp_path, title="run", config_text="", baselines={}, samples=None, environment={}).read_text()
    assert "<dd>24.4%</dd>" in page  # 5 of 20.5 seconds
    row = '<tr><td>compiling the step</td><td class="number">9.0</td><td class="number">43.9%</td></tr>'
    assert row in page
