"""The memory of a program as XLA lays it out, read from a process that compiles it.

XLA lays out memory before it generates code, which takes several times as long, so the process is ended in between.
"""

import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPORTS, TOTAL = "*memory-usage-report.txt", re.compile(r"Total bytes: (\d+)\b.*\n")
POLL = 0.5  # seconds
SHOWN = 2000  # characters of what a process has printed


class LaidOut(NamedTuple):
    """bytes: arguments, results and temporary arrays of one device. seconds: until they were laid out; and of
    processors until the process was ended; peak_bytes: the most memory that any such process has held so far."""

    bytes: int
    seconds: float
    processor_seconds: float
    peak_bytes: int


def laid_out(command: Sequence[str], *, module: str = "jit_step", limit_s: float | None = None) -> LaidOut:
    """Runs a command until XLA has laid out the memory of the module whose name matches `module`.

    Raises TimeoutError if that takes longer than `limit_s`, and RuntimeError, with the end of what the command printed,
    if it ends before.
    """
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as made, (Path(made) / "log").open("w+") as log:
        flags = f"--xla_dump_to={made} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={module}"
        environment = {
            **os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
            "JAX_ENABLE_COMPILATION_CACHE": "0",  # a program that is read from there is not laid out
        }  # fmt: skip
        child, found = subprocess.Popen(command, env=environment, stdout=log, stderr=log), None
        try:
            while (found := _reported(Path(made))) is None and child.poll() is None:
                if limit_s is not None and time.monotonic() - began > limit_s:
                    raise TimeoutError(f"memory was not laid out within {limit_s:g} s")
                time.sleep(POLL)
        finally:
            child.kill()
            child.wait()
        if found is None:  # it may have been written after the last look, before the process ended
            found = _reported(Path(made))
        if found is None:
            log.seek(0)
            raise RuntimeError(f"exit status {child.returncode} before memory was laid out: {log.read()[-SHOWN:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return LaidOut(found, time.monotonic() - began, used, after.ru_maxrss * 1024)


def _reported(folder: Path) -> int | None:
    """The bytes of XLA's report, once it is written."""
    found = [TOTAL.search(report.read_text()) for report in folder.glob(REPORTS)]
    return next((int(each[1]) for each in found if each), None)
