"""What a run appends outlives a full disk. The disk is a small one of its own, which needs the right to mount."""

import errno
import subprocess
from pathlib import Path

import pytest

from orogen.report.files import Appended
from orogen.report.metrics import MetricsWriter, read_metrics


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounts a small file system: run this test as root, with the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return filler


def test_bytes_that_a_full_disk_refuses_are_written_later(small):
    said = []
    file = Appended(small / "lines", log=said.append)
    file.write(b"a\n" * 2000)
    filler = fill(small)
    for letter in (b"b\n", b"c\n"):
        file.write(letter * 2000)  # the first fits in part: the file ends within a page
    assert len(said) == 1 and "No space left on device" in said[0]
    filler.unlink()
    file.write(b"d\n")
    file.close()
    assert (small / "lines").read_bytes() == b"a\n" * 2000 + b"b\n" * 2000 + b"c\n" * 2000 + b"d\n"
    assert said[1:] == [f"{small / 'lines'} is written again"]


def test_bytes_that_are_refused_to_the_end_are_an_error(small):
    file = Appended(small / "lines", log=lambda line: None)
    fill(small)
    file.write(b"x" * 5000)
    with pytest.raises(OSError, match="No space left on device: '.*lines'") as caught:
        file.close()
    assert caught.value.errno == errno.ENOSPC


def test_another_error_is_raised(tmp_path):
    file = Appended(tmp_path / "lines")
    file._file.close()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"x")


def test_metrics_and_events_survive_a_full_disk(small, capsys):
    """More events than the queue of tensorboardX's own writer holds, which would block here."""
    with MetricsWriter(small) as writer:
        writer.write({"step": 1, "loss": 1.0})
        filler = fill(small)
        for step in range(2, 60):
            writer.write({"step": step, "loss": 1.0 / step, "note": "x" * 200})
        filler.unlink()
        writer.write({"step": 60, "loss": 2.0})
    assert [record["step"] for record in read_metrics(small)] == list(range(1, 61))
    assert capsys.readouterr().err.count("\n") == 2
    events = b"".join(path.read_bytes() for path in (small / "tensorboard").iterdir())
    assert events.count(b"loss") == 60
