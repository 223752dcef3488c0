"""Cases in processes of their own, which wait for each other: scripts that write down what they do and when."""

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from orogen.bench import turns
from orogen.bench.turns import Turn, in_turn

CASE = textwrap.dedent(
    """
    import logging, os, pathlib, subprocess, sys, time
    from orogen.bench.turns import Turn
    log = pathlib.Path(sys.argv[1])
    turn = Turn(sys.argv[3], pathlib.Path(sys.argv[4]))
    def say(what):
        with log.open("a") as file:
            file.write(f"{what} {turn.name}\\n")
    if turn.name == "breaks":
        sys.exit("out of memory")
    if turn.name == "raises":
        error = ValueError("no such plan")
        error.add_note("-----\\nFor simplicity, frames are left out.")
        raise error
    if turn.name == "is killed":
        os.kill(os.getpid(), 9)
    if turn.name == "is killed later":
        logging.basicConfig()
        try:
            int("x")
        except ValueError:
            logging.exception("no number")
        print("step 7", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if turn.name == "asserts":
        print("RuntimeError: of a device that is not used", flush=True)
        try:
            int("x")
        except ValueError:
            assert turn.name == "x"
    if turn.name == "takes long":
        print("still buffered when it ends", end="")
        raise subprocess.TimeoutExpired(["ls"], 5)
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

    def run(*order: str, **limits: Any):
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


def test_the_error_is_told_from_the_notes_below_it(run):
    assert run("raises")[0].failures == {"raises": "exit status 1: ValueError: no such plan"}


def test_the_exception_that_ends_a_case_is_told_from_others_it_printed(run):
    assert run("asserts", "takes long", "is killed later")[0].failures == {
        "asserts": "exit status 1: AssertionError",
        "takes long": "exit status 1: subprocess.TimeoutExpired: Command '['ls']' timed out after 5 seconds",
        "is killed later": "exit status -9: step 7",
    }


def test_results_are_handed_over_whenever_a_case_ends(run):
    seen = []
    outcome, _ = run("first", "breaks", "last", ended=lambda so_far: seen.append(so_far))
    names = [({row["case"] for row in each.results}, set(each.failures)) for each in seen]
    assert names == [(set(), {"breaks"}), ({"first"}, {"breaks"}), ({"first", "last"}, {"breaks"})]
    assert seen[-1] == outcome


def test_what_a_failing_case_printed_is_kept_until_it_succeeds(run, tmp_path):
    logs = tmp_path / "logs"
    run("raises", "first", logs=logs)
    assert [file.name for file in logs.iterdir()] == ["raises.log"]
    assert "Traceback" in (logs / "raises.log").read_text()
    (logs / "first.log").write_text("of an earlier call")
    run("first", logs=logs)
    assert [file.name for file in logs.iterdir()] == ["raises.log"]


def test_a_case_does_not_outlive_its_caller_while_it_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 2.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # it has ended, but its number is still in use
    (tmp_path / "ready").mkdir()
    (tmp_path / "ended").mkdir()
    (tmp_path / "order.json").write_text('["first", "second"]')
    (tmp_path / "caller").write_text(str(gone.pid))
    with pytest.raises(ChildProcessError, match=rf"second has nobody to answer: process {gone.pid} is gone"):
        Turn("second", tmp_path).wait()
    gone.wait()
    (tmp_path / "caller").write_text(str(os.getppid()))
    (tmp_path / "ended" / "first").touch()
    Turn("second", tmp_path).wait()


def test_names_are_those_of_files(run):
    with pytest.raises(ValueError, match=r"'a/b'.*expected different names without a slash"):
        run("a/b")
    with pytest.raises(ValueError, match="expected different names"):
        run("twice", "twice")
