"""A run that hangs is ended."""

import subprocess
import sys
import threading
import time

import pytest

from orogen.train.watch import Watch

QUICK = {"process": 3, "tick_seconds": 0.01}


def watched(tmp_path, minutes, body):
    """What the watch said and its exit status while `body` ran."""
    said, ended, over = [], [], threading.Event()
    end = lambda status: (ended.append(status), over.set())  # noqa: E731
    with Watch(tmp_path, minutes, log=said.append, end=end, **QUICK) as watch:
        body(watch, over)
    return said, ended


def test_traces_of_all_threads_are_written_once(tmp_path):
    said, ended = watched(tmp_path, 0.05 / 60, lambda watch, over: over.wait(10))
    assert ended == [1]
    (line,) = said
    assert line.startswith("process 3 hangs: no step for 0 s") and str(tmp_path / "hang.3.txt") in line
    text = (tmp_path / "hang.3.txt").read_text()
    assert "in wait" in text and "in _hung" in text and text.count("hread 0x") >= 2


def test_progress_keeps_a_run_alive(tmp_path):
    def work(watch, over):
        for _ in range(30):
            watch.progress(0.01)
            time.sleep(0.01)

    assert watched(tmp_path, 0.2 / 60, work) == ([], [])
    assert not (tmp_path / "hang.3.txt").exists()


def test_the_limit_follows_the_usual_step(tmp_path):
    watch = Watch(tmp_path, 2.0, process=0, log=print)
    assert watch.limit == 120
    watch.expect_longer()
    assert watch.limit == 720
    for seconds in (500.0, 30.0, 20.0):
        watch.progress(seconds)
    assert watch.limit == 300
    for _ in range(2):
        watch.progress(1.0)
    assert watch.limit == 200
    watch.progress()
    assert watch.limit == 200


def test_nothing_is_watched_without_minutes(tmp_path):
    assert watched(tmp_path, 0.0, lambda watch, over: time.sleep(0.1)) == ([], [])


@pytest.mark.parametrize("folder", ["there", "missing"])
def test_the_process_ends_with_status_1(tmp_path, folder):
    """Also if the traces cannot be written."""
    (tmp_path / "there").mkdir()
    program = (
        "import pathlib, sys, time; from orogen.train.watch import Watch\n"
        "log = lambda line: print(line, flush=True)\n"
        "with Watch(pathlib.Path(sys.argv[1]), 0.001, process=0, log=log, tick_seconds=0.01): time.sleep(60)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path / folder], capture_output=True, text=True, timeout=50
    )
    assert answer.returncode == 1 and answer.stderr == "" and answer.stdout.count("\n") == 1
    assert ("could not be written" in answer.stdout) == (folder == "missing")
