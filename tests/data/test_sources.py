"""All kinds of files are read alike and exactly, and refused by file and line."""

import gzip
import hashlib
import json
import os
import random
import re

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from tests import fuzz

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data.corpora import content_hash, split_of
from orogen.data.readers import Document
from orogen.data.sources import linked_folders, read_documents, unread_files

TEXTS = ["first\r\nline  ", "", "zwei é 🙂", "<bos>\ttab\x00"]


def _lines(field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def _write(folder, kind, field="text"):
    file = folder / f"corpus{kind}"
    if kind == ".jsonl":
        file.write_bytes(_lines(field))
    elif kind == ".jsonl.gz":
        file.write_bytes(gzip.compress(_lines(field)))
    elif kind == ".jsonl.zst":
        file.write_bytes(zstandard.compress(_lines(field)))
    elif kind == ".parquet":
        parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), field: TEXTS}), file, row_group_size=3)
    return file


def _read(path, text_field="text"):
    return list(read_documents(path, text_field=text_field))


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_files_of_records_read_alike(tmp_path, kind, field):
    file = _write(tmp_path, kind, field)
    expected = [Document(f"{file.name}:{i}", text) for i, text in enumerate(TEXTS, start=1)]
    assert _read(file, field) == expected
    assert _read(tmp_path, field) == expected


def test_a_txt_file_is_a_document_to_the_byte(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in zip(("b/z.txt", "a.txt", "b.txt", "b/a.txt"), TEXTS, strict=True):
        (tmp_path / name).write_bytes(text.encode())
    assert _read(tmp_path) == [
        Document("a.txt", TEXTS[1]),
        Document("b.txt", TEXTS[2]),
        Document("b/a.txt", TEXTS[3]),
        Document("b/z.txt", TEXTS[0]),
    ]


def test_other_files_are_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "README.md").write_text("no")
    (tmp_path / "b.json").write_text("no")
    assert [document.key for document in _read(tmp_path)] == ["a.txt"]
    assert unread_files(tmp_path) == 2


def test_blank_lines_are_not_documents_but_count_as_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n  \n{"text": "four"}')
    assert _read(file) == [Document("a.jsonl:1", "one"), Document("a.jsonl:4", "four")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "expected one JSON object on the line"),
        (b'{"body": "x"}', "found ['body']: expected a JSON object with the field 'text'"),
        (b'["text"]', "found list: expected a JSON object with the field 'text'"),
        (b'{"text": 5}', "'text' is 5: expected a string"),
        (b'{"text": null}', "'text' is None: expected a string"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
        (b'{"text": ' + b"[" * 10**5, "expected one JSON object on the line"),
        (b'{"text": "a", "number": ' + b"7" * 6000 + b"}", "expected one JSON object on the line"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: ") + ".*" + re.escape(message)) as caught:
        _read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
    file = _write(tmp_path, ".parquet")
    with pytest.raises(ValueError, match=re.escape(f"{file}: found the columns ['id', 'text']: expected a column 'b'")):
        _read(file, "b")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), file)
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: 'text' is None: expected a string")):
        _read(file)


def test_paths_with_nothing_to_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus '.*absent' does not exist: expected 'stdlib', a file or"):
        _read(tmp_path / "absent")
    for _ in range(2):  # an empty folder, then one with an unsupported suffix only
        with pytest.raises(ValueError, match=r"has no file to read: expected \.txt, \.jsonl, .*\.parquet"):
            _read(tmp_path)
        (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"a\.csv' has no file to read"):
        _read(tmp_path / "a.csv")


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: byte 2 is not UTF-8"):
        _read(tmp_path)


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "damaged.jsonl.zst", "damaged.parquet"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    whole = gzip.compress(b'{"text": "hello"}\n' * 50)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if name.endswith("gz") else b"no such format")
    with pytest.raises(ValueError, match=rf"{name}: .*expected a whole, undamaged file"):
        list(read_documents(tmp_path, text_field="text"))


def _packed(window: int, *texts: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window, enable_ldm=True)
    frames = []
    for text in texts:
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        frames.append(packer.compress(text) + packer.flush())
    return b"".join(frames)


@pytest.mark.parametrize("window", [10, 27, 28, 31])
def test_zstd_of_any_window_and_number_of_frames_is_read(tmp_path, window):
    lines, skipped = _lines(), b"\x5f\x2a\x4d\x18\x05\x00\x00\x00later"
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(skipped + _packed(window, lines[:50], b"", lines[50:]) + skipped)
    assert [document.text for document in _read(file)] == TEXTS


def test_zstd_and_gzip_that_are_truncated_or_continue_are_refused(tmp_path):
    lines = b'{"text": "a"}\n' * 12_000
    whole = zstandard.ZstdCompressor().compress(lines)
    # A frame's blocks have 128 KiB of text each, so a reader that stopped after the first would see whole lines.
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"more", whole + whole[:9]):
        (tmp_path / "a.jsonl.zst").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.jsonl\.zst: .*expected a whole, undamaged file"):
            _read(tmp_path / "a.jsonl.zst")
    packed = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(packed + packed)
    assert len(_read(tmp_path / "a.jsonl.gz")) == 24_000
    for data in (packed[:-1], packed + b"more", packed + packed[:9]):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: .*expected a whole, undamaged file"):
            _read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress, zstandard.compress])
def test_an_endless_line_is_refused_before_it_fills_memory(tmp_path, monkeypatch, pack):
    monkeypatch.setattr("orogen.data.readers.MAX_LINE_BYTES", 100)
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(pack, "")
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(b'{"text": "' + b"x" * 85 + b'"}\n\n{"text": "' + b"x" * 10**6))
    with pytest.raises(ValueError, match=re.escape(f"{file}:3 has more than 100 bytes; expected a shorter line")):
        _read(file)


def test_linked_folders_are_counted_and_not_followed(tmp_path):
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for folder in (corpus / "a", other):
        folder.mkdir(parents=True)
        (folder / "b.txt").write_text("text")
    (corpus / "a" / "loop").symlink_to("..")
    (corpus / "other").symlink_to(other)
    (corpus / "file.txt").symlink_to(other / "b.txt")
    (corpus / "nothing.txt").symlink_to("absent")
    assert [document.key for document in _read(corpus)] == ["a/b.txt", "file.txt"]
    assert linked_folders(corpus) == 2
    assert unread_files(corpus) == 3
    (corpus / "a" / "b.txt").unlink()
    (corpus / "file.txt").unlink()
    with pytest.raises(ValueError, match=r"has no file to read \(2 links to folders are not followed\)"):
        _read(corpus)


def test_names_that_are_not_utf8_are_keys(tmp_path):
    names = [b"a\xff.txt", b"b\xfe.jsonl"]
    (tmp_path / os.fsdecode(names[0])).write_text("one")
    (tmp_path / os.fsdecode(names[1])).write_text('{"text": "two"}')
    documents = _read(tmp_path)
    assert [os.fsencode(document.key) for document in documents] == [names[0], names[1] + b":1"]
    # The split and the hash are of the name's bytes.
    config = DataConfig(corpus=str(tmp_path), tokenizer="byte", heldout_fraction=0.5, tuning_fraction=0.0, seed=7)
    for document in documents:
        place = int.from_bytes(hashlib.sha256(b"7:" + os.fsencode(document.key)).digest()[:8], "little") / 2**64
        assert split_of(document.key, config=config) == ("heldout" if place < 0.5 else "train")
    assert len(content_hash(documents)) == 64


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([1, 2], "'text' is 1: expected a string"),
        ([b"a"], "'text' is b'a': expected a string"),
        ([["a"]], "'text' is ['a']: expected a string"),
        ([{"a": "b"}], "'text' is {'a': 'b'}: expected a string"),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(tmp_path, texts, message):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), file)
    with pytest.raises(ValueError, match=re.escape(f"{file}:1: {message}")):
        _read(file)


@pytest.mark.parametrize("number", [195, 1751, 2571])
def test_parquet_that_pyarrow_does_not_implement_is_refused(tmp_path, number):
    """Malformed files that state integers of 4 or 128 bits."""
    read = fuzz.columns(None, random.Random(f"columns {number}"), tmp_path)
    with pytest.raises(ConfigError, match=r"a\.parquet: .*: expected a whole, undamaged file"):
        read()
