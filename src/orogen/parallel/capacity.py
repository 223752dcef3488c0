"""How much memory is still available: on the host, within the limits of its control groups, and on each device."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

GROUPS = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """Of a version of control groups: the files with the limit and the usage, and the fields of memory.stat that count
    memory which can be reclaimed."""

    limit: str
    used: str
    reclaimable: tuple[str, ...]


VERSION_2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))
VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def host_bytes() -> int:
    """The most bytes that this process can still allocate: from the machine, with its swap; within each control group
    that it is in; and within its own address-space limit."""
    return max(0, min([_machine(), *_groups(), *_addresses()]))


def device_bytes() -> int | None:
    """Bytes that are still available on each device; None if devices use the host's memory or do not report it."""
    if jax.default_backend() == "cpu":
        return None
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in found if "bytes_limit" in stats]
    return min(limits, default=None)


def _machine() -> int:
    """Bytes of memory and swap that the kernel reports as available; without such a report, all memory."""
    try:
        facts = _table(Path("/proc/meminfo"))
        return 1024 * (facts["MemAvailable:"] + facts["SwapFree:"])
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups() -> Iterator[int]:
    """What the process's control groups and their ancestors leave, plus the swap, which these limits do not count."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    swap = _swap()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (GROUPS, VERSION_2) if not controllers else (GROUPS / "memory", VERSION_1)
        inner = root / name.lstrip("/")
        # Inside a container the path may be the host's, and the root is the container's own group.
        for folder in dict.fromkeys([inner, *inner.parents, root]):
            if folder.is_relative_to(root) and (left := _left(folder, names)) is not None:
                yield left + swap


def _left(folder: Path, names: _Names) -> int | None:
    """The bytes that a control group leaves; None without a limit, or if it cannot be read."""
    try:
        most = (folder / names.limit).read_text().strip()
        if not most.isdecimal():  # "max"
            return None
        cache = _table(folder / "memory.stat")
        used = int((folder / names.used).read_text())
        return int(most) - used + sum(cache.get(name, 0) for name in names.reclaimable)
    except OSError:
        return None


def _addresses() -> Iterator[int]:
    """What the process's limit of its address space leaves, if it has one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
        except OSError:  # not Linux
            pages = 0
        yield limit - pages * os.sysconf("SC_PAGE_SIZE")


def _swap() -> int:
    try:
        return 1024 * _table(Path("/proc/meminfo"))["SwapFree:"]
    except (OSError, KeyError):
        return 0


def _table(file: Path) -> dict[str, int]:
    """Parses a file whose lines are a name, a number and possibly a unit."""
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}
