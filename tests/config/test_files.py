"""Files that are written atomically."""

from orogen.config.files import write_atomically


def test_an_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"a long old page")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
