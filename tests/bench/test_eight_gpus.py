"""The cases of the experiment on eight GPUs: their plans are legal, and each has a prediction."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orogen.bench.turns import Outcome

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


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        part="scaling", hardware="h200", cases=None, steps=2, training=3, limit=600.0, together=None, small=False,
        out=tmp_path,
    )  # fmt: skip


def test_rows_are_written_as_cases_end_beside_those_of_earlier_calls(script, options, monkeypatch, capsys):
    file = options.out / "results_scaling.jsonl"
    row = lambda case, ms, hardware="h200": {"case": case, "hardware": hardware, "ms": ms}  # noqa: E731
    known = lambda: [(r["case"], r["hardware"], r["ms"], r["call"]) for r in script._read(file)]  # noqa: E731

    def killed(names, command, *, ended, **limits):
        ended(Outcome([row("data 2", 1.0)], {}))
        ended(Outcome([row("data 2", 1.0), row("data 4", 2.0)], {}))
        raise SystemExit

    monkeypatch.setattr(script, "in_turn", killed)
    with pytest.raises(SystemExit):
        script._measured(["data 2", "data 4", "data 8"], options)
    assert known() == [("data 2", "h200", 1.0, 1), ("data 4", "h200", 2.0, 1)]

    def fails(names, command, *, ended, **limits):
        outcome = Outcome([row("data 4", 3.0), row("data 2", 4.0, "h100")], {"data 8": "out of memory"})
        ended(outcome)
        return outcome

    monkeypatch.setattr(script, "in_turn", fails)
    assert script._measured(["data 4", "data 8"], options).failures == {"data 8": "out of memory"}
    assert known() == [("data 2", "h200", 1.0, 1), ("data 4", "h200", 3.0, 2), ("data 2", "h100", 4.0, 2)]
    assert capsys.readouterr().err == "data 8 failed: out of memory\n"


def test_cases_of_a_later_group_are_not_begun_without_time(script, options, monkeypatch):
    groups = []

    def late(names, command, *, ended, **limits):
        groups.append((list(names), "--limit" in command))
        monkeypatch.setattr(script, "BEGAN", script.BEGAN - options.limit)
        return Outcome([{"case": name, "hardware": "h200"} for name in names], {})

    monkeypatch.setattr(script, "in_turn", late)
    monkeypatch.setattr(script, "BEGAN", time.monotonic())
    options.together = 2
    outcome = script._measured(["a", "b", "c"], options)
    assert groups == [(["a", "b"], True)]
    assert outcome.failures == {"c": "not begun within the limit of 600 s"}


def test_too_few_devices_and_unknown_cases_are_one_line(script, options, monkeypatch, capsys):
    monkeypatch.setattr(script, "COUNT", "print(4, 'gpu')")
    options.cases = ["one GPU", "data 4"]
    assert script._lacking({name: script.cases_of("scaling", "h200")[name] for name in options.cases}) is None
    options.cases = ["data 8", "stage 8"]
    assert script.run(options) == 2
    lines = capsys.readouterr().err.splitlines()
    expected = "--part scaling: expected 8 GPUs, found 4, too few for data 8, stage 8; --cases takes others"
    assert lines == [expected]
    two = {"data 2": script.cases_of("scaling", "h200")["data 2"]}
    expected = "expected 2 GPUs, found 0, too few for data 2; --cases takes others"
    for count, why in (
        ("raise SystemExit('no driver')", "counting them ended with exit status 1: no driver"),
        ("import sys; sys.stderr.write('no plugin\\n'); print(8, 'cpu')", "devices are of kind cpu: no plugin"),
        ("import time; time.sleep(60)", "counting them took longer than 1.5 s"),
    ):
        monkeypatch.setattr(script, "COUNT", count)
        monkeypatch.setattr(script, "COUNT_S", 1.5 if "sleep" in count else 60.0)
        assert script._lacking(two) == f"{expected} ({why})"
    options.cases = ["data 3"]
    assert script.run(options) == 2
    assert capsys.readouterr().err.startswith("--cases ['data 3']; expected some of ['one GPU', 'data 2',")


def test_training_stops_where_the_timed_steps_would_lack_time(script, monkeypatch):
    routed: Any = sys.modules["routed"]
    clock = [100.0]
    monkeypatch.setattr(routed.time, "monotonic", lambda: clock[0])

    class Metrics:
        def __init__(self, loss):
            self.loss = loss

    def program(state, batch):
        clock[0] += 20 if state == 0 else 1  # the first step sets up communication
        return state + 1, Metrics(float(state))

    # The third of 8 steps ends at 122; each takes 1 s, and 4 more have to follow until 130.
    state, losses = routed.trained(program, 0, lambda: None, steps=8, after=4.0, ends=130.0)
    assert (state, losses) == (7, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    clock[0] = 100.0
    assert routed.trained(program, 0, lambda: None, steps=3, after=4.0, ends=130.0)[0] == 3
