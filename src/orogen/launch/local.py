"""A task on several processes of this host, watched by this one.

Each process has a session of its own, so that Ctrl-C reaches the watcher alone, which passes signals on to all. Each
process's output goes to files; that of the first, which reports for all, also goes to the terminal. When one process
fails, the watcher ends the others: they would wait for it until the runtime gives up. They also end, and save first if
they can, when the watcher is gone.
"""

import contextlib
import ctypes
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

from orogen.command import EXIT_BAD_INPUT, EXIT_FAILURE
from orogen.config.checks import ConfigError
from orogen.config.streams import say
from orogen.parallel.cluster import VARIABLE
from orogen.report.files import Appended

GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL, after one process did not end well
LATE_SECONDS = 120.0  # for the others, once one has ended well
LOOK_SECONDS = 0.2
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = 128 + signal.SIGINT
CHUNK = 2**16
LAST_LINE = 300  # characters of it in a message
GPUS = "CUDA_VISIBLE_DEVICES"
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Ended(NamedTuple):
    """How a process ended. status: its exit status, or minus the signal that killed it; line: the last that it wrote to
    stderr."""

    number: int
    pid: int
    status: int
    line: str

    def described(self, count: int) -> str:
        """In one line."""
        if self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
        else:
            how = f"ended with status {self.status}"
        last = f"; its last line: {self.line}" if self.line else ""
        return f"process {self.number} of {count} (pid {self.pid}) {how}{last}"


class Child:
    """One process. Its output is copied to files in `folder`, and to the terminal while `shown`."""

    def __init__(self, number: int, command: Sequence[str], environment: Mapping[str, str], folder: Path, shown: bool):
        self.number, self.shown, self.line = number, shown, b""
        self.process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=end_with_parent,
        )  # fmt: skip
        streams = ((self.process.stdout, "out", sys.stdout), (self.process.stderr, "err", sys.stderr))
        self._copies = [
            threading.Thread(target=self._copy, args=(stream, folder / f"process_{number}.{kind}", to), daemon=True)
            for stream, kind, to in streams
        ]
        for thread in self._copies:
            thread.start()

    def wait(self, ended: "queue.Queue[Ended]") -> None:
        """Waits for its end, and puts it into the queue."""
        status = self.process.wait()
        for thread in self._copies:  # a process that it left behind may still hold its streams
            thread.join(1.0)
        line = self.line.decode(errors="replace").strip()[:LAST_LINE]
        ended.put(Ended(self.number, self.process.pid, status, line))

    def signal(self, number: int) -> None:
        """Sends the signal to it and to what it started."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:  # it has just ended
                return

    def _show(self, chunk: bytes, terminal: Any) -> None:
        try:
            terminal.write(chunk.decode(errors="replace"))
            terminal.flush()
        except OSError:  # nobody reads, or it goes to a file on a full disk; the files in `folder` have it
            self.shown = False

    def _copy(self, source: IO[bytes], file: Path, terminal: Any) -> None:
        part, kept = b"", _Kept(file)
        with source:
            while chunk := os.read(source.fileno(), CHUNK):
                kept.write(chunk)
                if self.shown:
                    self._show(chunk, terminal)
                if file.suffix == ".err":
                    *lines, part = (part + chunk).splitlines(keepends=True)[-2:] or [b""]
                    self.line = next((line for line in (part, *reversed(lines)) if line.strip()), self.line)
        kept.close()


class _Kept:
    """A file of output. Errors of the disk are not raised: the process that writes the output would otherwise block,
    since nothing reads its pipe."""

    def __init__(self, path: Path):
        self._path, self._file, self._said = path, None, False
        self.write(b"")

    def write(self, chunk: bytes) -> None:
        """Adds the chunk, or says that it is lost. What a full disk refuses is kept for later."""
        try:
            if self._file is None:
                self._file = Appended(self._path)
            self._file.write(chunk)
        except OSError as error:
            self._file = None  # its unwritten bytes are lost; the next write opens the file again
            self._lost(error)

    def close(self) -> None:
        """Closes the file; says so if some of its content is lost."""
        try:
            if self._file is not None:
                self._file.close()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if not self._said:
            say(f"orogen: {self._path} lacks output: it cannot be written ({error.strerror})")
        self._said = True


class Watcher:
    """Starts the processes of a task, and starts them again if they do not end well.

    command: of one process; its argument tells whether to continue what another began. environments: one for each
    process, beside what `cluster` gives.
    """

    def __init__(
        self, command: Callable[[bool], Sequence[str]], environments: Sequence[Mapping[str, str]], folder: Path
    ):
        self._command, self._environments, self._folder = command, environments, folder
        self._children: list[Child] = []
        self._asked: int | None = None

    @property
    def count(self) -> int:
        """The number of processes."""
        return len(self._environments)

    def run(self, restarts: int) -> int:
        """Runs the task until it ends well, has bad input, or was started `restarts` times again. Returns its exit
        status."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._signals():
            for again in range(restarts + 1):
                failed = self._attempt(resume=again > 0)
                if failed is None:
                    return INTERRUPTED if self._asked == signal.SIGINT else 0
                left = restarts - again
                goes_on = left > 0 and self._asked is None and failed.status != EXIT_BAD_INPUT
                then = f"; starting again, {left - 1} more times at most" if goes_on else ""
                say(f"orogen: {failed.described(self.count)}; the others were ended; logs in {self._folder}{then}")
                if not goes_on:
                    return EXIT_BAD_INPUT if failed.status == EXIT_BAD_INPUT else EXIT_FAILURE
        raise AssertionError("restarts is negative")

    def _attempt(self, *, resume: bool) -> Ended | None:
        """Runs the processes once. Returns the first that did not end well."""
        ended: queue.Queue[Ended] = queue.Queue()
        coordinator = f"127.0.0.1:{free_port()}"
        self._children = []
        for number, extra in enumerate(self._environments):
            environment = {**os.environ, **extra, VARIABLE: f"{coordinator},{self.count},{number}"}
            child = Child(number, self._command(resume), environment, self._folder, shown=number == 0)
            self._children.append(child)
            threading.Thread(target=child.wait, args=(ended,), daemon=True).start()
        if self._asked is not None:  # the signal came before they were there
            self._pass_on(self._asked)
        left, deadline, failed = self.count, None, None
        while left:
            if deadline is not None and time.monotonic() > deadline:
                failed = failed or self._late()
                self._end(signal.SIGKILL)
                deadline = None
            try:
                one = ended.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue
            left -= 1
            if failed is None and not self._well(one.status):
                failed, deadline = one, time.monotonic() + GRACE_SECONDS
                self._end(signal.SIGTERM)
            elif failed is None:
                deadline = time.monotonic() + LATE_SECONDS
        return failed

    def _well(self, status: int) -> bool:
        """Whether a process that ended with this status did what it was told to."""
        if self._asked is None:
            return status == 0
        # A process that could not handle the signal yet was killed by it.
        return status in (0, -self._asked) or (self._asked == signal.SIGINT and status == INTERRUPTED)

    def _late(self) -> Ended:
        """The first process that has not ended though another ended well."""
        late = next(child for child in self._children if child.process.returncode is None)
        return Ended(
            late.number, late.process.pid, -signal.SIGKILL, f"(none for {LATE_SECONDS:g} s after another's end)"
        )

    def _end(self, number: int) -> None:
        for child in self._children:
            child.shown = False  # its messages from now on are consequences of the first failure
            child.signal(number)

    def _pass_on(self, number: int, frame: FrameType | None = None) -> None:
        self._asked = self._asked or number
        for child in self._children:
            child.signal(number)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in PASSED_ON}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def free_port() -> int:
    """A TCP port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """The numbers of this host's GPUs that a process sees; none if JAX is told to use another platform."""
    if environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if (given := environment.get(GPUS)) is not None:
        return given.split(",") if given else []
    found = (path.name for path in devices.glob("nvidia*"))
    return [str(number) for number in sorted(int(name[6:]) for name in found if re.fullmatch(r"nvidia\d+", name))]


def shared_gpus(processes: int, environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[dict[str, str]]:
    """For each process, the variable that gives it its part of this host's GPUs; nothing if there is none, or if JAX is
    told to use another platform. Raises ConfigError unless the processes can share them evenly."""
    visible = visible_gpus(environment, devices)
    if not visible:
        return [{}] * processes
    if len(visible) % processes:
        raise ConfigError(
            f"--processes is {processes}; expected a number that divides the {len(visible)} GPUs of this host"
        )
    size = len(visible) // processes
    return [{GPUS: ",".join(visible[size * k : size * (k + 1)])} for k in range(processes)]


_LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Lets the system send SIGTERM to this process when its parent is gone."""
    if hasattr(_LIBC, "prctl"):  # Linux
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
