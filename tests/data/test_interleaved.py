"""Documents of text and images, from every source; malformed ones are named by their place."""

import io
import json
import os
import tarfile
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from orogen.config.checks import ConfigError
from orogen.data import interleaved
from orogen.data.interleaved import read_image, read_interleaved
from orogen.vision.transforms import ImageError, decode

A, B = b"first image", b"second"


def tar(folder, members):
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "shard.tar"


def parts(corpus):
    return [one.parts for one in read_interleaved(corpus)]


def test_lines_of_pairs_and_of_lists(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(A)
    (tmp_path / "b.png").write_bytes(B)
    lines = [
        {"image": "b.png", "caption": "two"},
        {"images": [None, "in/a.png", None], "texts": ["see", None, "one"]},
    ]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = list(read_interleaved(tmp_path))
    assert [one.parts for one in found] == [(B, "two"), ("see", A, "one")]
    assert [one.key for one in found] == ["c.jsonl:1", "c.jsonl:3"]
    assert [one.caption for one in found] == ["two", None]


def test_rows_of_parquet(tmp_path):
    file = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"image": [{"bytes": A, "path": None}], "caption": ["one"]}), file)
    assert parts(file) == [(A, "one")]
    columns = {"images": [[A, None, B], [None]], "texts": [[None, "x", None], ["alone"]]}
    parquet.write_table(pyarrow.table(columns), file)
    assert parts(file) == [(A, "x", B), ("alone",)]


def test_webdataset_groups_files_up_to_the_first_dot(tmp_path):
    lists = json.dumps({"images": ["0.JPG".lower(), None], "texts": [None, "after"]}).encode()
    members = {
        "d/7.png": A, "d/7.txt": b"seven", "8.json": b'{"caption": "eight"}', "8.jpg": B,
        "9.json": lists, "9.0.jpg": A,
    }  # fmt: skip
    assert parts(tar(tmp_path, members)) == [(A, "seven"), (B, "eight"), (A, "after")]


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"image": "../x.png", "caption": "y"}', "outside the folder"),
        ('{"image": "no.png", "caption": "y"}', "does not exist"),
        ('{"caption": "y"}', "expected image and caption"),
        ('{"images": [null], "texts": [null]}', "place 0 has both or neither"),
        ('{"images": [null], "texts": ["a", "b"]}', "lists of equal length"),
        ("[1", "expected JSON"),
        ('{"image": "a\\u0000.png", "caption": "y"}', "is no path"),
        ('{"images": [null], "texts": ["a \\ud800 b"]}', "lone surrogate"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, expected):
    (tmp_path / "c.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=expected):
        parts(tmp_path)


def test_archives_and_tables_that_are_none_are_refused(tmp_path):
    for name, expected in (("a.tar", "expected a tar archive"), ("b.parquet", "expected a Parquet file")):
        (tmp_path / name).write_bytes(b"not this")
        with pytest.raises(ConfigError, match=expected):
            parts(tmp_path / name)
    with pytest.raises(ConfigError, match="expected one image"):
        parts(tar(tmp_path, {"1.png": A, "1.jpg": B, "1.txt": b"x"}))
    with pytest.raises(ConfigError, match="it has 'list'; expected image and caption"):
        parts(tar(tmp_path, {"1.png": A, "1.json": b"[1]"}))
    with pytest.raises(ConfigError, match="lone surrogate"):
        parts(tar(tmp_path, {b"\xff.png".decode("utf-8", "surrogateescape"): A, "\udcff.txt": b"x"}))
    with pytest.raises(ConfigError, match="does not exist"):
        parts(tmp_path / "nowhere")


def test_a_damaged_table_is_one_line_wherever_it_is_damaged(tmp_path):
    """pyarrow raises OSError for some bytes, and UnicodeDecodeError for a text that is none."""
    table = pyarrow.table({"image": [A] * 30, "caption": [f"seven{n:03}" for n in range(30)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    parquet.write_table(table, tmp_path / "whole.parquet", **options)
    whole = (tmp_path / "whole.parquet").read_bytes()
    pages = bytes(b ^ 0x40 if 4 <= n < 30 else b for n, b in enumerate(whole))  # headers of the pages of images
    texts = {name: whole.replace(b"seven007", b"seven" + name.encode("latin-1")) for name in ("0x7", "\xff07")}
    for name, data in (("checksum", texts["0x7"]), ("text", texts["\xff07"]), ("pages", pages)):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        with pytest.raises(ConfigError, match=f"{name}.parquet: .*; expected a Parquet file") as caught:
            parts(tmp_path / f"{name}.parquet")
        assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_too_large_is_left_out_and_not_read_whole(tmp_path):
    """It is sparse here: to read it would end this process."""
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**42)
    lines = [{"image": "x.png", "caption": "y"}, {"images": [None], "texts": ["after"]}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    large, after = read_interleaved(tmp_path / "c.jsonl")
    assert after.parts == ("after",) and len(large.parts[0]) == interleaved.MAX_BYTES + 1
    with pytest.raises(ImageError, match="too large; expected at most 100,000,000 bytes"):
        decode(large.parts[0])


def test_an_archive_s_image_may_be_too_large_but_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(interleaved, "MAX_BYTES", 5)
    members = {"1.PNG": A, "1.txt": b"one", "2.png": b"png", "2.txt": b"two", "3.png": A, "3.txt": b"long text"}
    found = read_interleaved(tar(tmp_path, members))
    assert [next(found).parts, next(found).parts] == [(A[:6], "one"), (b"png", "two")]
    with pytest.raises(ConfigError, match="3.txt has 9 bytes; expected at most 5"):
        next(found)


@pytest.mark.parametrize("file", ["/dev/zero", "pipe"])
def test_an_image_without_an_end_is_refused(tmp_path, monkeypatch, file):
    monkeypatch.setattr(interleaved, "MAX_BYTES", 5)
    if file == "pipe":
        file = tmp_path / "pipe"
        os.mkfifo(file)
        threading.Thread(target=file.write_bytes, args=(A,), daemon=True).start()
    with pytest.raises(ConfigError, match="image 0 has more than 5 bytes; expected no more"):
        read_image(Path(file), "image 0")
