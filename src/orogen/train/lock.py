"""The lock of a run folder: one process trains there at a time, on this host or another that shares the disk.

The lock is a file that names its holder. It is created by a hard link, which is atomic on NFS too (flock is missing
there, or works within one host only). The holder touches it every BEAT_SECONDS. On the holder's host, its process id
and start time tell whether it is alive; on another host it counts as dead once the lock is untouched for STALE_SECONDS.
A process that finds the lock of another host waits until it is touched or that old: a job that was put back into a
queue may start again, elsewhere, seconds after it was killed.
"""

import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError

NAME = "run.lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 180.0  # more than the minute for which NFS clients may cache a file's times
LOOK_SECONDS = 1.0  # between looks at another host's lock


class RunLock:
    """Holds the lock of `run_dir` from `__enter__` to `__exit__`, or to `release`. Creates the folder if needed.

    Raises ConfigError, naming the holder, if a living process holds it. log: gets a line if a dead one held it, and one
    if that takes time to find out.
    """

    def __init__(self, run_dir: Path, *, log: Callable[[str], None], beat_seconds: float = BEAT_SECONDS):
        self.path, self._log, self._beat_seconds = run_dir / NAME, log, beat_seconds
        self._mine = _this_process() | {"token": uuid.uuid4().hex}
        self._released = threading.Event()
        self.beating = True  # until the file turns out to name another process

    def __enter__(self) -> "RunLock":
        self._made = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f"{NAME}.{self._mine['token']}.tmp")
        draft.write_text(json.dumps(self._mine))
        try:
            if not _link(draft, self.path):
                self._take_over(draft)
        finally:
            draft.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="run lock").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    @property
    def mine(self) -> bool:
        """Whether the file still names this process: a process that slept for long may have been taken for dead."""
        holder = _read(self.path)
        return holder is not None and holder.get("token") == self._mine["token"]

    def release(self) -> None:
        """Removes the lock if it is still this process's, and the folder if nothing else was put into it."""
        self._released.set()
        if self.mine:
            self.path.unlink(missing_ok=True)
        try:
            if self._made and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
        except FileNotFoundError:  # the folder is gone: it was released before, or somebody removed it
            return

    def _take_over(self, draft: Path) -> None:
        """Replaces a dead holder's lock. A second link keeps two processes from doing so at once."""
        _require_dead(self.path, lambda: _clock(draft), self._log)
        now = _clock(draft)
        turn = self.path.with_name(NAME + ".taking")
        if not _link(draft, turn):
            if (other := _living(turn, now)) is not None:
                raise ConfigError(_refusal(self.path.parent, other))
            turn.unlink(missing_ok=True)
            if not _link(draft, turn):
                raise ConfigError(_refusal(self.path.parent, _read(turn) or {}))
        try:
            check_free(self.path.parent, now=now)
            before = _read(self.path)
            draft.replace(self.path)
        finally:
            turn.unlink(missing_ok=True)
        self._log(f"{self.path.parent}: took over the lock of a process that is gone ({_described(before or {})})")

    def _beat(self) -> None:
        while not self._released.wait(self._beat_seconds):
            try:
                self.beating = self.mine
                if self.beating:
                    os.utime(self.path)
            except OSError:  # the disk is unreachable for now
                continue  # the next beat may reach it


def check_free(run_dir: Path, *, now: float | None = None) -> None:
    """Raises ConfigError if a living process holds the lock. now: by the file server's clock; None: this host's."""
    holder = _living(run_dir / NAME, now)
    if holder is not None:
        raise ConfigError(_refusal(run_dir, holder))


def await_free(run_dir: Path, *, log: Callable[[str], None]) -> None:
    """`check_free`, once it is known whether a holder on another host is alive, which takes up to STALE_SECONDS. log:
    gets a line before that."""
    _require_dead(run_dir / NAME, lambda: datetime.datetime.now().timestamp(), log)


def _require_dead(path: Path, clock: Callable[[], float], log: Callable[[str], None]) -> None:
    """Raises ConfigError if a living process holds the lock at `path`. If its holder is on another host, this waits
    until the lock is touched, is removed or is old. clock: should be the file server's, but need not be right."""
    before, said, deadline = _touched(path), False, time.monotonic() + STALE_SECONDS
    while (holder := _living(path, clock())) is not None:
        if holder.get("machine") == _this_process()["machine"] or _touched(path) not in (before, None):
            raise ConfigError(_refusal(path.parent, holder))
        if time.monotonic() > deadline:
            return
        if not said:
            waiting = f"waiting {STALE_SECONDS:g} s at most for a sign of life"
            log(f"{path.parent} is locked ({_described(holder)}); {waiting}")
        said = True
        time.sleep(LOOK_SECONDS)


def _clock(file: Path) -> float:
    """The time by the clock of the server of `file`, which is touched. Locks have their times from the same clock."""
    os.utime(file)
    return file.stat().st_mtime


def _touched(path: Path) -> float | None:
    """When the file was last changed, by the file server's clock; None if there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _link(draft: Path, path: Path) -> bool:
    """Links `draft` to `path` unless that exists; returns whether it did."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links
        try:
            with path.open("x") as file:
                file.write(draft.read_text())
        except FileExistsError:
            return False
    return True


def _living(path: Path, now: float | None) -> dict[str, Any] | None:
    """The lock's record of its holder; None if there is no lock or its holder is dead."""
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return None
    holder = _read(path) or {}
    here = _this_process()
    if holder.get("machine") == here["machine"]:
        started = _started(holder.get("pid"))
        gone = started is None or started != holder.get("started")
    else:
        gone = (datetime.datetime.now().timestamp() if now is None else now) - touched > STALE_SECONDS
    return None if gone else holder


def _read(path: Path) -> dict[str, Any] | None:
    """The record in a lock; None if there is no lock, {} if the file holds something else."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _this_process() -> dict[str, Any]:
    """This process as a lock records it. machine: equal only for processes that see each other's ids, unlike a host
    name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        machine = f"{socket.gethostname()} {uuid.getnode()}"
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "since": since, "machine": machine, "started": _started(pid)}


def _started(pid: Any) -> str | None:
    """When the process `pid` of this machine began, in the system's own units; None if there is none."""
    if type(pid) is not int or pid < 1:
        return None
    try:
        # Field 22 of proc(5), counted after the name in parentheses, which may hold spaces. A zombie counts as dead.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except ProcessLookupError:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        return "unknown"
    return "unknown"


def _described(holder: dict[str, Any]) -> str:
    return f"host {holder.get('host')}, pid {holder.get('pid')}, since {holder.get('since')}"


def _refusal(run_dir: Path, holder: dict[str, Any]) -> str:
    return f"run folder {str(run_dir)!r} is in use ({_described(holder)}); expected one that no other process trains in"
