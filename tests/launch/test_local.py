"""Processes that are watched: trivial ones, since what they run is not the watcher's concern."""

import contextlib
import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.launch.local import Ended, Watcher, shared_gpus
from orogen.report.files import Appended

# What every process below can do: its number, a file for each process that it makes when it is ready, patience.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
number = int(os.environ["OROGEN_CLUSTER"].split(",")[2])
folder = Path(os.environ["FOLDER"])
def ready():
    (folder / f"ready{number}").touch()
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)
"""
FOREVER = "ready(); time.sleep(100)"


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """(code of each process, processes, restarts) -> exit status, if the watcher runs here."""
    monkeypatch.setenv("FOLDER", str(tmp_path))

    def run(code: str, processes: int = 2, restarts: int = 0) -> int:
        def command(resume: bool) -> list[str]:
            return [sys.executable, "-c", f"resume = {resume}\n{PRELUDE}\n{textwrap.dedent(code)}"]

        return Watcher(command, [{}] * processes, tmp_path / "logs").run(restarts)

    return run


def test_a_task_that_ends_well(watch, tmp_path, capfd):
    assert watch("print('out', number); print('err', number, file=sys.stderr)", processes=3) == 0
    said = capfd.readouterr()
    assert (said.out, said.err) == ("out 0\n", "err 0\n")  # of the first process alone
    for number in range(3):
        assert (tmp_path / "logs" / f"process_{number}.out").read_text() == f"out {number}\n"
        assert (tmp_path / "logs" / f"process_{number}.err").read_text() == f"err {number}\n"


def test_processes_know_each_other(watch, tmp_path):
    watch("(folder / str(number)).write_text(os.environ['OROGEN_CLUSTER'])", processes=2)
    (first, *one), (second, *two) = ((tmp_path / str(k)).read_text().split(",") for k in (0, 1))
    assert first == second and first.startswith("127.0.0.1:")
    assert (one, two) == (["2", "0"], ["2", "1"])


def test_a_killed_process_ends_the_others_and_is_named(watch, capfd):
    started = time.monotonic()
    code = """
    if number == 1:
        print("about to go", file=sys.stderr, flush=True)
        wait_for("ready0")
        os.kill(os.getpid(), signal.SIGKILL)
    ready(); time.sleep(100)
    """
    assert watch(code) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line.startswith("orogen: process 1 of 2 (pid ") and "was killed by SIGKILL; its last line: about to go" in line
    )
    assert time.monotonic() - started < 10


def test_the_first_failure_counts(watch, capfd):
    code = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if number == 0:
        wait_for("ready1")
        sys.exit(2)
    ready(); time.sleep(100)
    """
    assert watch(code, restarts=3) == 2  # bad input stays bad
    (line,) = capfd.readouterr().err.splitlines()
    assert "process 0 of 2" in line and "ended with status 2;" in line


def test_a_process_that_ignores_sigterm_is_killed(watch, monkeypatch, tmp_path):
    monkeypatch.setattr("orogen.launch.local.GRACE_SECONDS", 0.3)
    code = """
    if number == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / "pid").write_text(str(os.getpid()))
        ready(); time.sleep(100)
    wait_for("ready0"); sys.exit(1)
    """
    assert watch(code) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("refuses", ["opening", "some writes", "all writes", "with another error"])
def test_output_that_cannot_be_kept_does_not_hold_a_process_up(watch, tmp_path, monkeypatch, capfd, refuses):
    """It writes more than a pipe holds."""
    kind = errno.ESTALE if refuses == "with another error" else errno.ENOSPC
    tries = {"opening": 1, "some writes": 2}.get(refuses, 1000)

    class Refusing(Appended):
        def __init__(self, path):
            if refuses == "opening" and path.name == "process_1.out" and next(left) < tries:
                raise OSError(kind, os.strerror(kind))
            super().__init__(path)
            if path.name == "process_1.out":
                self._file = Disk(self._file)

    class Disk:
        def __init__(self, file):
            self.write = lambda content: refuse(file, content)
            self.close = file.close

    def refuse(file, content):
        if refuses != "opening" and next(left) < tries:
            raise OSError(kind, os.strerror(kind))
        return file.write(content)

    left = itertools.count()
    monkeypatch.setattr("orogen.launch.local.Appended", Refusing)
    assert watch("sys.stdout.write(number * 300_000 * 'x')") == 0
    lines, kept = capfd.readouterr().err.splitlines(), tmp_path / "logs" / "process_1.out"
    reason = {"some writes": "kept until it can"}.get(
        refuses, f"lacks output: it cannot be written ({os.strerror(kind)}"
    )
    assert any("process_1.out" in line and reason in line for line in lines)
    assert len(lines) == (1 if refuses in ("opening", "with another error") else 2)
    if refuses == "some writes":
        assert kept.stat().st_size == 300_000


def test_a_terminal_that_fails_does_not_hold_a_process_up(watch, tmp_path, monkeypatch):
    class Failing(io.StringIO):
        def flush(self):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Failing())
    assert watch("sys.stdout.write(300_000 * 'x')", processes=1) == 0
    assert (tmp_path / "logs" / "process_0.out").stat().st_size == 300_000


def test_one_that_does_not_end_with_the_others(watch, monkeypatch, capfd):
    monkeypatch.setattr("orogen.launch.local.LATE_SECONDS", 0.3)
    assert watch("if number == 0: ready(); time.sleep(100)") == 1
    assert "process 0 of 2" in capfd.readouterr().err


def test_restarts_resume_and_are_counted(watch, tmp_path, capfd):
    code = """
    with (folder / f"attempts{number}").open("a") as file:
        file.write(f"{resume} ")
    if number == 1:
        wait_for("ready0")
        sys.exit(7)
    ready(); time.sleep(100)
    """
    assert watch(code, restarts=2) == 1
    assert (tmp_path / "attempts1").read_text() == "False True True "
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and "starting again" in lines[0] and "starting again" not in lines[2]


def test_a_restart_may_end_well(watch):
    assert watch("sys.exit(0 if resume else 1)", restarts=1) == 0


@contextlib.contextmanager
def watching(tmp_path, code: str):
    """The watcher in a process of its own; its two processes are ready. Yields it."""
    program = f"""
import sys
from pathlib import Path
from orogen.launch.local import Watcher
command = lambda resume: [sys.executable, "-c", {PRELUDE + textwrap.dedent(code)!r}]
sys.exit(Watcher(command, [{{}}, {{}}], Path({str(tmp_path / "logs")!r})).run(1))
"""
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    watcher = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while not all((tmp_path / f"ready{k}").exists() for k in (0, 1)):
            assert watcher.poll() is None
            time.sleep(0.02)
        yield watcher
    finally:
        watcher.kill()
        watcher.wait()


@pytest.mark.parametrize(
    ("name", "own", "status"), [("SIGTERM", 0, 0), ("SIGINT", 130, 130), ("SIGHUP", 0, 0), ("SIGTERM", 1, 1)]
)
def test_signals_are_passed_on_and_their_end_awaited(tmp_path, name, own, status):
    code = f"""
    def stop(*_):
        time.sleep(0.2)
        (folder / f"saved{{number}}").touch()
        sys.exit({own})
    signal.signal(signal.{name}, stop)
    {FOREVER}
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, which the watcher would inherit
    with watching(tmp_path, code) as watcher:
        watcher.send_signal(signal.Signals[name])
        _, said = watcher.communicate(timeout=20)
    assert watcher.returncode == status
    assert all((tmp_path / f"saved{k}").exists() for k in (0, 1)) and ("starting again" not in said)


def test_processes_end_when_the_watcher_is_killed(tmp_path):
    code = f"(folder / f'pid{{number}}').write_text(str(os.getpid())); {FOREVER}"
    with watching(tmp_path, code) as watcher:
        pids = [int((tmp_path / f"pid{k}").read_text()) for k in (0, 1)]
        watcher.kill()
        watcher.wait()
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ends_are_described():
    assert Ended(3, 17, -9, "").described(4) == "process 3 of 4 (pid 17) was killed by SIGKILL"
    assert Ended(0, 17, 1, "why").described(2) == "process 0 of 2 (pid 17) ended with status 1; its last line: why"


def test_gpus_are_shared_out(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    part = "CUDA_VISIBLE_DEVICES"
    assert shared_gpus(2, {}, tmp_path) == [{part: "0,1"}, {part: "2,10"}]
    assert shared_gpus(1, {part: "3,1"}, tmp_path) == [{part: "3,1"}]
    assert shared_gpus(2, {"JAX_PLATFORMS": "cpu"}, tmp_path) == [{}, {}]
    assert shared_gpus(2, {part: ""}, tmp_path) == [{}, {}]
    assert shared_gpus(2, {}, tmp_path / "none") == [{}, {}]
    with pytest.raises(ConfigError, match="--processes is 3; expected a number that divides the 4 GPUs"):
        shared_gpus(3, {}, tmp_path)
