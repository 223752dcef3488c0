"""The cases of the experiment on eight GPUs: their plans are legal, and each has a prediction."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "eight_gpus"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    own = ("cases", "plans", "routed", "run")
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in own:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("hardware", ["h100", "h200"])
def test_every_case_that_is_timed_has_a_prediction_and_a_toy(script, hardware):
    predictions = [json.loads(line) for line in script.PREDICTED.read_text().splitlines()]
    predicted = {(row["part"], row["case"]): row for row in predictions if row["hardware"] == hardware}
    cases = {
        (part, name): c for part in (*script.PARTS, "routed") for name, c in script.cases_of(part, hardware).items()
    }
    assert predicted.keys() == cases.keys()
    for key, case in cases.items():
        full, toy = case.config(), case.config(small=True)
        assert full.check().plan.devices == toy.check().plan.devices <= 8
        if key[0] in ("nano", "routed"):
            assert full.plan.devices == 8
            assert full.train.batch_size * full.train.sequence_length == 64 * 8192
            assert predicted[key]["gb"] < {"h100": 80, "h200": 141}[hardware]


def test_a_table_puts_predictions_and_shares_beside_times(script):
    one = {"case": "one", "against": None, "devices": 1, "ms": 100.0, "tokens_per_second": 1000, "mfu": 0.5, "gb": 2.0}
    two = {**one, "case": "two", "against": "one", "devices": 2, "ms": 125.0, "tokens_per_second": 1600, "mfu": None}
    lines = script.table([one, two], {"two": {"ms": 110.0, "mfu": 0.45}}).splitlines()[2:]
    assert lines == [
        "| one | 100.0 |  | 1,000 | 50.0% |  | 2.0 |  |",
        "| two | 125.0 | 110.0 | 1,600 |  | 45.0% | 2.0 | 80.0% |",
    ]
