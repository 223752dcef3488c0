"""How much memory there is, from a kernel's files written by hand."""

import resource

import pytest

from orogen.parallel import capacity


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A folder in place of /sys/fs/cgroup."""
    monkeypatch.setattr(capacity, "GROUPS", tmp_path)
    return tmp_path


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def test_a_limit_counts_less_what_is_used_and_cannot_be_taken_back(groups):
    stat = "anon 300\ninactive_file 40\nactive_file 5\n"
    write(groups / "a", memory__max="1000\n", memory__current="345\n", memory__stat=stat)
    assert capacity._left(groups / "a", capacity.VERSION_2) == 1000 - 345 + 45
    write(groups / "b", memory__max="max\n", memory__current="345\n", memory__stat=stat)
    assert capacity._left(groups / "b", capacity.VERSION_2) is None
    assert capacity._left(groups / "none", capacity.VERSION_2) is None
    stat = "total_inactive_file 30\ntotal_active_file 2\ninactive_file 1\n"
    write(groups / "c", memory__limit_in_bytes="500", memory__usage_in_bytes="100", memory__stat=stat)
    assert capacity._left(groups / "c", capacity.VERSION_1) == 500 - 100 + 32


def test_the_root_of_a_container_is_its_own_group(groups):
    write(groups, memory__max="1000", memory__current="0", memory__stat="")
    write(groups / "memory", memory__limit_in_bytes="700", memory__usage_in_bytes="0", memory__stat="")
    swap = capacity._swap()
    assert {left - swap for left in capacity._groups()} <= {1000, 700} and list(capacity._groups())


def test_the_host_has_some_memory_and_less_under_a_limit_on_addresses(monkeypatch):
    free = capacity.host_bytes()
    assert 2**26 < free < 2**50
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (size + 2**24, size + 2**24))
    assert 0 <= capacity.host_bytes() <= 2**24 + 2**22


def test_simulated_devices_have_no_memory_of_their_own():
    assert capacity.device_bytes() is None
