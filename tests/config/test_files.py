"""Files that are written atomically."""

from pathlib import Path

import pytest

from orogen.config.files import write_atomically


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
