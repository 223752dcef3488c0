"""The lock of a run folder: who holds it, whose is stale, and what a second process is told."""

import json
import os
import subprocess
import sys
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.train.lock import NAME, STALE_SECONDS, RunLock, check_free


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


@pytest.mark.parametrize(("age", "free"), [(STALE_SECONDS - 60, False), (STALE_SECONDS + 5, True)])
def test_another_hosts_lock_counts_while_it_is_touched(tmp_path, age, free):
    holder(tmp_path, host="elsewhere", machine="elsewhere", pid=1)
    os.utime(tmp_path / NAME, (time.time() - age,) * 2)
    if free:
        with RunLock(tmp_path, log=lambda line: None) as lock:
            assert lock.mine
    else:
        with pytest.raises(ConfigError, match="host elsewhere, pid 1"):
            RunLock(tmp_path, log=print).__enter__()


@pytest.mark.parametrize("content", ["", "[]", "nonsense", '{"pid": "x"}'])
def test_a_lock_that_names_nobody_counts_until_it_is_old(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(ConfigError, match="in use"):
        RunLock(tmp_path, log=print).__enter__()
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
