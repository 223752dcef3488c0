"""Runs a program of a stranger: no network, no files, and limits on time, memory, processes and output.

With bubblewrap (https://github.com/containers/bubblewrap) the program has namespaces of its own: it sees the system's
libraries and this Python, read-only, and an empty folder. Without, only the limits hold, and it can read and write what
this user can: that must be allowed by name.
"""

import os
import resource
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
MOST_PROCESSES = 64
# What a program of ours needs to start: the interpreter's own folders and the system's libraries.
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")


class Ran(NamedTuple):
    """What came of a program. end: finished, failed (another status than 0, or a signal), timeout or flood."""

    end: str
    output: bytes


class Sandbox:
    """seconds: of wall-clock time for each program, and of processor time; memory: bytes of address space.

    Raises ConfigError without bubblewrap, unless `unsandboxed`.
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

    def run(self, source: str, given: bytes = b"") -> Ran:
        """Runs Python source with `given` on stdin, in an empty folder that is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="orogen-") as folder:
            (Path(folder) / "main.py").write_text(source, encoding="utf-8", errors="surrogateescape")
            (Path(folder) / "stdin").write_bytes(given)
            with (Path(folder) / "stdin").open("rb") as stdin:
                # start_new_session: its processes end together. The limits pass through bubblewrap to the program.
                process = subprocess.Popen(
                    self._command(folder), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "HOME": "/tmp"}, start_new_session=True, preexec_fn=self._limit,
                )  # fmt: skip
            try:
                return _watched(process, time.monotonic() + self.seconds)
            finally:
                _end(process)

    def _command(self, folder: str) -> list[str]:
        python = [sys.executable, "-I", "-S", "-B"]
        if self._bwrap is None:
            return [*python, f"{folder}/main.py"]
        own = {sys.base_prefix, sys.prefix, sysconfig.get_paths()["stdlib"], str(Path(sys.executable).resolve().parent)}
        seen = [path for path in (*SYSTEM, *sorted(own)) if Path(path).exists()]
        binds = [word for path in seen for word in ("--ro-bind", path, path)]
        return [
            self._bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
            *binds, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", folder, "/tmp/task",
            "--chdir", "/tmp", "--", *python, "/tmp/task/main.py",
        ]  # fmt: skip

    def _limit(self) -> None:
        whole = max(1, int(self.seconds) + 1)
        for name, most in (
            ("CPU", whole), ("AS", self.memory), ("FSIZE", MOST_FILE), ("NPROC", None), ("CORE", 0), ("NOFILE", 64),
        ):  # fmt: skip
            kind = getattr(resource, f"RLIMIT_{name}")
            if most is None:  # counts all of this user's processes, so that it cannot be a small number without bwrap
                most = MOST_PROCESSES if self._bwrap is not None else resource.getrlimit(kind)[1]
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard) if most >= 0 else hard
            resource.setrlimit(kind, (most, most))


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
