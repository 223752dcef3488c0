"""Runs an untrusted program: no network, no files, and limits on time, memory, processes and output.

With bubblewrap (https://github.com/containers/bubblewrap, 0.8 or later) the program has namespaces of its own:
it sees the system's libraries and this Python, read-only, and an empty folder. Without, only the limits hold, and it
can read and write what this user can, the file of the tasks and the memory of other processes among it: that must be
allowed by name.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from orogen.config.checks import ConfigError

MOST_OUTPUT = 2**20  # bytes of stdout; what writes more is ended
MOST_FILE = 2**20  # bytes of a file
MOST_FILES = 2**26  # bytes of all files in /tmp, and of those in /dev/shm
MOST_ERRORS = 2**16  # bytes of stderr that are read
# Of the sandbox: each may take all of the memory that one program may.
MOST_PROCESSES = 8
START_SECONDS = 20.0
# Begins in the sandbox: limits of processes would else count those outside of it. The program then runs in the same
# interpreter, whose start costs more than most programs, and finds nothing of this in its namespace. What it imports is
# little: `json` alone would take as long as the interpreter's start.
STARTED = b"started\n"
_LIMITED = f"""
def begun():
    import os, resource, sys
    for word in sys.argv[1].split(","):
        name, _, most = word.partition("=")
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        most = int(most) if hard == resource.RLIM_INFINITY else min(int(most), hard)
        resource.setrlimit(kind, (most, most))
    os.write(1, {STARTED!r})
    del sys.argv[:2]
    globals()["__file__"] = sys.argv[0]
    with open(sys.argv[0], "rb") as file:
        return compile(file.read(), sys.argv[0], "exec", dont_inherit=True)
exec(globals().pop("begun")())
"""
# What a program of ours needs to start: the interpreter's own folders and the system's libraries.
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")


class Ran(NamedTuple):
    """What came of a program. end: finished, failed (another status than 0, or a signal), timeout or flood."""

    end: str
    output: bytes


class SandboxError(RuntimeError):
    """A sandbox that did not start, which says nothing about the program."""


class Sandbox:
    """seconds: of wall-clock time for each program, and of processor time; memory: bytes of address space of a process.

    Raises ConfigError without bubblewrap, unless `unsandboxed`; and if no program runs.
    """

    def __init__(self, *, seconds: float, memory: int, unsandboxed: bool = False) -> None:
        found = shutil.which("bwrap")
        if found is None and not unsandboxed:
            raise ConfigError(
                "code runs in bubblewrap, and `bwrap` is not on the PATH; expected it, or "
                "EnvironmentConfig.unsandboxed = True for code that you trust"
            )
        self.seconds, self.memory = seconds, memory
        self._bwrap = None if unsandboxed else found
        self.require("a program that prints 1", "print(1)", output=b"1\n")

    def run(self, source: str, given: bytes = b"", *, trusted: bool = False) -> Ran:
        """Runs Python source with `given` on stdin, in an empty folder that is removed afterwards. Raises
        SandboxError if the program did not begin.

        trusted: whether the source is ours, and runs what is not ours in a child that it keeps from its memory and open
        files: it is process 1 of the sandbox then, and none of bubblewrap's is in there with the child.
        """
        ran, errors = self._ran(source, given, self.seconds, trusted)
        if ran is None:
            raise SandboxError(f"the sandbox did not start: {errors}")
        return ran

    def require(self, what: str, source: str, given: bytes = b"", *, output: bytes = b"") -> None:
        """Raises ConfigError unless this source, which is ours, runs to its end and writes `output`."""
        ran, errors = self._ran(source, given, max(self.seconds, START_SECONDS), trusted=True)
        if ran != Ran("finished", output):
            raise ConfigError(
                f"{what} does not run in the sandbox: {errors or ran}; expected a bubblewrap that works here, of "
                "version 0.8 or later, a Python with ctypes, and enough EnvironmentConfig.memory_mb"
            )

    def _ran(self, source: str, given: bytes, seconds: float, trusted: bool) -> tuple[Ran | None, str]:
        """What came of it, None if it did not begin; and the last line of stderr."""
        # What is on stdin has no name in the folder, and is not open here while the program runs: without bubblewrap,
        # a program may look into this process too.
        with (
            tempfile.TemporaryDirectory(prefix="orogen-") as folder, tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as errors,
        ):  # fmt: skip
            (Path(folder) / "main.py").write_text(source, encoding="utf-8", errors="surrogateescape")
            stdin.write(given)
            stdin.seek(0)
            # start_new_session: its processes end together.
            process = subprocess.Popen(
                self._command(folder, trusted), stdin=stdin, stdout=subprocess.PIPE, stderr=errors, cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": "/tmp"}, start_new_session=True,
            )  # fmt: skip
            stdin.close()
            try:
                ran = _watched(process, time.monotonic() + seconds)
            finally:
                _end(process)
            errors.seek(0)
            said = errors.read(MOST_ERRORS).decode(errors="replace").strip().splitlines()
        begun = ran.output.startswith(STARTED)
        return (ran._replace(output=ran.output[len(STARTED) :]) if begun else None), said[-1] if said else ""

    def _command(self, folder: str, trusted: bool) -> list[str]:
        python = [sys.executable, "-I", "-S", "-B"]
        limits = ",".join(f"{name}={most}" for name, most in self._limits().items())
        limited = [*python, "-c", _LIMITED, limits]
        if self._bwrap is None:
            return [*limited, f"{folder}/main.py"]
        own = {sys.base_prefix, sys.prefix, sysconfig.get_paths()["stdlib"], str(Path(sys.executable).resolve().parent)}
        seen = [path for path in (*SYSTEM, *sorted(own)) if Path(path).exists()]
        binds = [word for path in seen for word in ("--ro-bind", path, path)]
        size = ["--size", str(MOST_FILES), "--tmpfs"]
        # Without --as-pid-1, bubblewrap is process 1 of the sandbox, with our stdin and the descriptor that tells
        # the outside the exit status, and a program may take both. A program that is not ours has no use for them, for
        # its output is compared outside; as process 1, it could undo that it dies with bubblewrap (PR_SET_PDEATHSIG).
        first = ["--as-pid-1"] if trusted else []
        # /tmp comes first, or it would hide a Python that lies there. What is not limited in size is read-only.
        return [
            self._bwrap, "--unshare-all", *first, "--die-with-parent", "--new-session", "--clearenv",
            "--cap-drop", "ALL", *size, "/tmp", *binds, "--proc", "/proc", "--dev", "/dev", *size, "/dev/shm",
            "--ro-bind", folder, "/tmp/task", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--",
            *limited, "/tmp/task/main.py",
        ]  # fmt: skip

    def _limits(self) -> dict[str, int]:
        limits = {"CPU": int(self.seconds) + 1, "AS": self.memory, "FSIZE": MOST_FILE, "CORE": 0, "NOFILE": 64}
        if self._bwrap is not None:  # else it counts all of this user's processes, and cannot be a small number
            limits["NPROC"] = MOST_PROCESSES
        return limits


def _watched(process: "subprocess.Popen[bytes]", deadline: float) -> Ran:
    """Reads what the process writes until it closes stdout, writes too much or is late."""
    assert process.stdout is not None
    waiting = select.poll()
    waiting.register(process.stdout, select.POLLIN)
    parts: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not waiting.poll(left * 1000):
            return Ran("timeout", b"".join(parts))
        part = os.read(process.stdout.fileno(), 2**16)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > MOST_OUTPUT:
            return Ran("flood", b"".join(parts)[:MOST_OUTPUT])
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Ran("timeout", b"".join(parts))
    return Ran("finished" if status == 0 else "failed", b"".join(parts))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and all that it started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.poll()  # it has ended, and so has all of its group
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
