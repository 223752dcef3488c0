"""What signals do to a run, and to other commands that take long."""

import errno
import importlib
import io
import operator
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from tests.train.kills import MOMENTS

from orogen.config.streams import lasting_streams, say
from orogen.train.stop import Stop, StoppedEarlyError, StopTogether


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """Nor in child processes, which inherit that: a shell ignores SIGINT in its background jobs, and nohup SIGHUP."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGHUP", 0), ("SIGINT", 130)])
def test_a_signal_asks_and_gives_its_status(name, status):
    before = signal.getsignal(signal.Signals[name])
    with Stop() as stop:
        stop.working = True
        signal.raise_signal(signal.Signals[name])
        assert stop.asked and stop.status == status
    assert signal.getsignal(signal.Signals[name]) == before


def test_without_anything_to_save_a_signal_ends_the_run_with_its_status():
    with Stop(), pytest.raises(StoppedEarlyError) as caught:
        signal.raise_signal(signal.SIGINT)
    assert caught.value.status == 130


def test_a_signal_cuts_short_what_can_be_done_again():
    with Stop() as stop:
        stop.working = True
        assert stop.unless_asked(lambda: "done") == "done"
        assert stop.unless_asked(lambda: signal.raise_signal(signal.SIGTERM) or "done") is None
        assert stop.unless_asked(lambda: "done") is None


class _Finalizer:
    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_inside_a_finalizer_is_not_lost(number, capfd):
    """Python drops exceptions that are raised there."""
    with Stop() as stop, pytest.raises(StoppedEarlyError) as caught:
        _Finalizer(number)
        time.sleep(10)
    assert stop.asked and caught.value.status == stop.status

    def work() -> str:
        _Finalizer(number)
        time.sleep(10)
        return "done"

    with Stop() as stop:
        assert stop.unless_asked(work) is None
    assert capfd.readouterr().err == ""


def test_a_signal_inside_a_finalizer_is_not_lost_by_a_run_that_ends_at_once():
    with Stop() as stop:
        stop.working = True
        _Finalizer(signal.SIGINT)
    assert stop.asked and stop.status == 130
    with Stop() as stop, pytest.raises(StoppedEarlyError):  # a second one, as soon as the first was dropped
        _Finalizer(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    time.sleep(0.05)  # no timer is left


def test_other_exceptions_of_finalizers_are_reported_as_before(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: reported.append(dropped.exc_value))
    before = sys.unraisablehook
    with Stop():
        _Finalizer(-1)
    assert [type(error) for error in reported] == [ValueError] or [type(error) for error in reported] == [OSError]
    assert sys.unraisablehook == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def said(program: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, **options)


def test_a_second_interrupt_ends_at_once_and_lets_go():
    answer = said(
        "import signal, os; from orogen.train.stop import Stop\n"
        "with Stop() as stop:\n"
        "    stop.working, stop.at_once = True, lambda: print('let go', flush=True)\n"
        "    signal.raise_signal(signal.SIGINT); print('saving', flush=True); signal.raise_signal(signal.SIGINT)\n"
        "    print('never')"
    )
    assert answer.returncode == 130
    assert answer.stdout == "saving\nlet go\n"
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_moments_of_random_kills_are_there(moment):
    module, path, _, _ = MOMENTS[moment]
    assert callable(operator.attrgetter(path)(importlib.import_module(module)))


@pytest.mark.parametrize("task", ["verify", "score", "generate", "convert", "bench"])
def test_an_interrupt_of_other_commands_is_one_line(task, monkeypatch, capsys):
    from orogen import cli

    files = {
        "verify": ["--gin_file", "x.gin"],
        "score": ["--checkpoint", "x", "--tokens", "x.npy", "--out", "x.npz"],
        "generate": ["--checkpoint", "x"],
        "convert": ["to-hf", "x", "y"],
        "bench": ["cpu_train"],
    }

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", [command._replace(run=interrupted) for command in cli.COMMANDS])
    before = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main([task, *files[task]]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "orogen: interrupted\n")


LASTING = (
    "import os, sys; from orogen.config.streams import lasting_streams\n"
    "os.read(0, 1)\n"
    "with lasting_streams():\n"
    "    for stream in (sys.stdout, sys.stderr):\n"
    "        for _ in range(2000): print('x' * 80, file=stream, flush=True)\n"
    "open(sys.argv[1], 'w').write('saved')"
)


class _FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_no_closed_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", _FullDisk())
    with pytest.raises(OSError, match="No space left"), lasting_streams():
        print("x")


def test_a_full_disk_under_the_log_does_not_end_a_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", _FullDisk())
    say("x")
    with lasting_streams():
        print("x", file=sys.stderr, flush=True)
        say("x")


def test_without_stderr_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    say("x")


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_run_outlives_its_terminal(kind, tmp_path):
    ours, theirs = os.pipe() if kind == "pipe" else pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LASTING, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.close(ours)
    process.communicate(b"x", timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "saved"


class _Store:
    """The runtime's key-value store, which several processes share."""

    def __init__(self, monkeypatch):
        self.values: dict[str, int] = {}
        monkeypatch.setattr("orogen.train.stop.distributed.propose", self.values.setdefault)
        monkeypatch.setattr("orogen.train.stop.distributed.settled", self.values.get)


def _together(count: int) -> list[tuple[Stop, StopTogether]]:
    """The stops of processes of one run."""
    found = []
    for _ in range(count):
        stop = Stop()
        stop.alone = False
        together = StopTogether(stop)
        together._name = "stop"  # of a process of its own, which counts alike
        found.append((stop, together))
    return found


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("asked", [[0], [1], [0, 1]])
def test_processes_stop_after_the_same_step(monkeypatch, asked, ahead):
    """Process 1 is as far ahead of process 0 as it can be: it dispatches a step once process 0 has dispatched the step
    before the last one."""
    _Store(monkeypatch)
    processes = _together(2)
    stopped: dict[int, int] = {}
    done = [0, 0]  # steps dispatched

    def dispatch(place: int) -> None:
        processes[place][1].before(done[place] + 1)
        done[place] += 1

    def decide(place: int) -> None:
        if place not in stopped and processes[place][1].after(done[place]):
            stopped[place] = done[place]

    for number in range(1, 12):
        if number == 5:
            for place in asked:
                processes[place][0].asked = True
        order = (1, 0) if ahead else (0, 1)
        for place in order:
            if place not in stopped:
                dispatch(place)
        for place in order:  # the metrics of the step before are there: all have dispatched it
            decide(place)
    assert stopped in ({0: 6, 1: 6}, {0: 5, 1: 5}) and len(set(stopped.values())) == 1


def test_a_process_of_several_only_notes_a_signal(monkeypatch):
    monkeypatch.setattr("orogen.train.stop.distributed.count", lambda: 2)
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)  # not working yet, and not cut short
        assert stop.asked and stop.unless_asked(lambda: "done") == "done"


def test_one_process_stops_at_once():
    stop = Stop()
    together = StopTogether(stop)
    assert not together.after(3)
    stop.asked = True
    together.before(4)
    assert together.after(4)
