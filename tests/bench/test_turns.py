"""Cases in processes of their own, which wait for each other: scripts that write down what they do and when."""

import sys
import textwrap

import pytest

from orogen.bench.turns import in_turn

CASE = textwrap.dedent(
    """
    import os, pathlib, sys, time
    from orogen.bench.turns import Turn
    log = pathlib.Path(sys.argv[1])
    turn = Turn(sys.argv[3], pathlib.Path(sys.argv[4]))
    def say(what):
        with log.open("a") as file:
            file.write(f"{what} {turn.name}\\n")
    if turn.name == "breaks":
        sys.exit("out of memory")
    if turn.name == "is killed":
        os.kill(os.getpid(), 9)
    time.sleep({"slow": 0.6, "never ready": 60}.get(turn.name, 0))
    say("compiled")
    turn.wait()
    say("begins")
    time.sleep(60 if turn.name == "hangs" else 0.3)
    say("ends")
    turn.answer([{"case": turn.name, "number": n} for n in range(2)])
    """
)


@pytest.fixture
def run(tmp_path):
    script, log = tmp_path / "case.py", tmp_path / "log"
    script.write_text(CASE)

    def run(*order: str, **limits: float):
        outcome = in_turn(order, [sys.executable, str(script), str(log)], **limits)
        return outcome, log.read_text().splitlines() if log.exists() else []

    return run


def test_cases_run_alone_and_in_order_once_all_are_compiled(run):
    outcome, log = run("first", "slow", "last")
    assert sorted(log[:3]) == ["compiled first", "compiled last", "compiled slow"]
    assert log[3:] == [f"{what} {name}" for name in ("first", "slow", "last") for what in ("begins", "ends")]
    assert [(row["case"], row["number"]) for row in outcome.results] == [
        (name, number) for name in ("first", "slow", "last") for number in range(2)
    ]
    assert outcome.failures == {}


def test_cases_that_fail_hold_up_nobody(run):
    outcome, log = run("breaks", "is killed", "last")
    assert log == ["compiled last", "begins last", "ends last"]
    assert outcome.failures == {
        "breaks": "exit status 1: out of memory",
        "is killed": "exit status -9: nothing was printed",
    }
    assert {row["case"] for row in outcome.results} == {"last"}


def test_a_limit_ends_what_still_runs_and_keeps_the_rest(run):
    outcome, log = run("first", "hangs", limit_s=3)
    assert "begins hangs" in log and "ends hangs" not in log
    assert outcome.failures == {"hangs": "ended after the limit of 3 s"}
    assert {row["case"] for row in outcome.results} == {"first"}


def test_a_case_that_is_not_ready_in_time_is_not_waited_for(run):
    outcome, log = run("never ready", "first", "last", ready_s=2.5)
    assert log[2:] == [f"{what} {name}" for name in ("first", "last") for what in ("begins", "ends")]
    assert outcome.failures == {"never ready": "ended after the limit of 2.5 s"}


def test_names_are_those_of_files(run):
    with pytest.raises(ValueError, match=r"'a/b'.*expected different names without a slash"):
        run("a/b")
    with pytest.raises(ValueError, match="expected different names"):
        run("twice", "twice")
