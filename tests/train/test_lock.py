"""The lock of a run folder: who holds it, whose is stale, and what a second process is told."""

import json
import os
import subprocess
import sys
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.train.lock import NAME, STALE_SECONDS, RunLock, await_free, check_free


def holder(run_dir, **changes) -> None:
    """Writes a lock there as this process would, with `changes`."""
    lines: list[str] = []
    with RunLock(run_dir, log=lines.append) as lock:
        record = json.loads(lock.path.read_text())
    (run_dir / NAME).write_text(json.dumps(record | changes))


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path):
    with RunLock(tmp_path / "run", log=print):
        with pytest.raises(ConfigError, match=rf"in use \(host .+, pid {os.getpid()}, since \d{{4}}-.*\); expected"):
            RunLock(tmp_path / "run", log=print).__enter__()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gone", ["lock", "folder", "folder that was there"])
def test_a_lock_that_is_gone_is_released(tmp_path, gone):
    run_dir = tmp_path / "run"
    if gone == "folder that was there":
        run_dir.mkdir()
    with RunLock(run_dir, log=print) as lock:
        lock.path.unlink()
        if gone != "lock":
            run_dir.rmdir()
    lock.release()
    assert not run_dir.exists()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from orogen.train.lock import RunLock\n"
        "RunLock(Path(sys.argv[1]), log=print).__enter__(); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"pid {process.pid}, "):
        check_free(tmp_path)
    process.kill()  # not waited for: a zombie counts as dead too
    while "Z" not in open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0]:
        time.sleep(0.01)
    lines: list[str] = []
    with RunLock(tmp_path, log=lines.append):
        assert len(lines) == 1 and f"pid {process.pid}" in lines[0]
    assert not list(tmp_path.iterdir())
    process.wait()


def test_another_process_with_the_holders_id_is_not_the_holder(tmp_path):
    holder(tmp_path, started="1")
    with RunLock(tmp_path, log=lambda line: None) as lock:
        assert lock.mine


def from_elsewhere(run_dir, age: float) -> None:
    """A lock of another host, last touched `age` seconds ago."""
    holder(run_dir, host="elsewhere", machine="elsewhere", pid=1)
    os.utime(run_dir / NAME, (time.time() - age,) * 2)


def test_an_old_lock_of_another_host_is_taken_over_at_once(tmp_path):
    from_elsewhere(tmp_path, STALE_SECONDS + 5)
    lines: list[str] = []
    await_free(tmp_path, log=lines.append)
    with RunLock(tmp_path, log=lines.append) as lock:
        assert lock.mine
    assert len(lines) == 1 and "took over" in lines[0]


def test_a_run_waits_until_the_lock_of_another_host_is_old(tmp_path, monkeypatch):
    """As after a requeue: the job that held it was killed a moment ago."""
    monkeypatch.setattr("orogen.train.lock.LOOK_SECONDS", 0.01)
    for wait in (lambda log: await_free(tmp_path, log=log), lambda log: RunLock(tmp_path, log=log).__enter__()):
        from_elsewhere(tmp_path, STALE_SECONDS - 0.5)
        lines, began = [], time.monotonic()
        wait(lines.append)
        assert 0.3 < time.monotonic() - began < 20
        assert "is locked (host elsewhere, pid 1" in lines[0] and "waiting 180 s at most for a sign of life" in lines[0]
    assert len(lines) == 2 and json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_touched_lock_of_another_host_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("orogen.train.lock.LOOK_SECONDS", 0.01)
    from_elsewhere(tmp_path, STALE_SECONDS - 60)
    beat = lambda line: os.utime(tmp_path / NAME, (time.time() - 5,) * 2)  # noqa: E731 - while the other waits
    for wait in (lambda: await_free(tmp_path, log=beat), lambda: RunLock(tmp_path, log=beat).__enter__()):
        with pytest.raises(ConfigError, match="host elsewhere, pid 1"):
            wait()
        os.utime(tmp_path / NAME, (time.time() - 120,) * 2)


def test_clocks_of_hosts_may_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("orogen.train.lock.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("orogen.train.lock.STALE_SECONDS", 0.2)
    from_elsewhere(tmp_path, -3600)
    await_free(tmp_path, log=lambda line: None)


@pytest.mark.parametrize("content", ["", "[]", "nonsense", '{"pid": "x"}'])
def test_a_lock_that_names_nobody_counts_until_it_is_old(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(ConfigError, match="in use"):
        check_free(tmp_path)
    os.utime(tmp_path / NAME, (0, 0))
    with RunLock(tmp_path, log=lambda line: None) as lock:
        assert lock.mine


def test_a_holder_touches_its_lock_and_notices_another(tmp_path):
    with RunLock(tmp_path, log=print, beat_seconds=0.02) as lock:
        os.utime(lock.path, (0, 0))
        end = time.monotonic() + 20
        while lock.path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)
        lock.path.write_text("{}")
        while lock.beating:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert (tmp_path / NAME).read_text() == "{}"  # another process's lock is left alone
