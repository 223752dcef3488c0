"""Files that are written atomically."""

import os
from pathlib import Path

import pytest

from orogen.config.files import write_atomically
from orogen.train.run_folder import describe_run


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"a long old page")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_two_that_write_one_file_at_once_disturb_neither(tmp_path, monkeypatch):
    """The second writes all of its own between the first one's writing and its renaming."""
    path, replace = tmp_path / "page.html", Path.replace

    def late(temporary: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        write_atomically(path, b"second")
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", late)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "page").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "page", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["page"]


def test_a_run_removes_what_a_killed_one_has_not_finished(tmp_path, monkeypatch):
    """Files of other names stay."""
    (tmp_path / "rollouts").mkdir()
    kept = {"rollouts/1.jsonl", "mine.tmp", ".lock.0a1b.tmp", "config.gin", "env.json"}
    for name in ("rollouts/1.jsonl", "mine.tmp", ".lock.0a1b.tmp"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(Path, "replace", lambda *_: None)  # as if the process ended before it
    for name in ("rollouts/1.jsonl", "report.html"):
        write_atomically(tmp_path / name, b"half")
    monkeypatch.undo()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5
    describe_run(tmp_path, "", {})
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_a_run_removes_nothing_of_another_process_and_nothing_by_a_link(tmp_path):
    """`orogen evaluate --out` may write into the run folder."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    own = f"a.{os.getpid()}.0123abcd.tmp"
    alive, left, beyond = run / f"a.{os.getppid()}.0123abcd.tmp", run / own, elsewhere / own
    for path in (alive, left, beyond):
        path.write_bytes(b"half")
    (run / "folder").symlink_to(elsewhere, target_is_directory=True)
    (run / f"b{own}").symlink_to(beyond)
    describe_run(run, "", {})
    assert alive.exists() and beyond.exists() and (run / f"b{own}").is_symlink()
    assert not left.exists()
