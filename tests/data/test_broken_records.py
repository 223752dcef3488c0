"""What a store leaves out: records that cannot be used are counted and named, and the others stay."""

import gzip
import json
import lzma
import random

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from orogen.cli import main
from orogen.config.data import DataConfig
from orogen.data import make_store, store
from orogen.data.readers import Broken, Document, read_records
from orogen.data.vocabulary import byte_tokenizer

UNIT = 900  # bytes


def made(config, folder):
    return make_store.make_store(config, folder, workers=1, unit_bytes=UNIT)


def grouped(damaged, *, in_text=False):
    """A Parquet file of three row groups. The head of a page in one of them is damaged, or the text, which a checksum
    tells."""
    sink = pa.BufferOutputStream()
    texts = [f"row {i} " + random.Random(i).randbytes(200).hex() for i in range(30)]
    options = {"use_dictionary": False, "compression": "none", "write_page_checksum": True}
    parquet.write_table(pa.table({"text": texts}), sink, row_group_size=10, **options)
    data = bytearray(sink.getvalue().to_pybytes())
    column = parquet.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(damaged).column(0)
    place = column.data_page_offset + (column.total_compressed_size // 2 if in_text else 0)
    data[place : place + 8] = b"?" * 8
    return bytes(data)


def not_utf8():
    """A Parquet file of three rows, the second of which is not UTF-8."""
    offsets, data = (
        pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 6, 10))),
        pa.py_buffer(b"good\xff\xfelast"),
    )
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": pa.StringArray.from_buffers(3, offsets, data)}), sink)
    return sink.getvalue().to_pybytes()


GOOD = [{"text": f"good {i} {'word ' * i}"} for i in range(40)]


def bad_corpora():
    """By name: the name and bytes of a file, how many records are broken, words of the reason, good documents."""
    lines = "\n".join(json.dumps(one) for one in GOOD).encode()
    noise = random.Random(0).randbytes(3000)
    table = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ["x"] * 9 + [None] + ["y"] * 5}), table)
    columns = pa.BufferOutputStream()
    parquet.write_table(pa.table({"body": ["x"]}), columns)
    content = table.getvalue().to_pybytes()
    numbers = lines + b'\n{"text": 7}\n{"body": "a"}\n["text"]\n{"text": "later"}\n{"text": "\\ud800"}'
    yield "empty jsonl", "z.jsonl", b"", 0, None, 0
    yield "empty text", "z.txt", b"", 0, None, 1
    yield "NUL", "z.txt", b"a\0b", 1, "z.txt holds NUL characters; expected text", 0
    yield "NUL in a line", "z.jsonl", b'{"text": "a\\u0000"}\n{"text": "b"}', 1, "z.jsonl:1 holds NUL characters", 1
    yield "binary", "z.txt", b"\xff" + noise, 1, "byte 0 is not UTF-8: expected UTF-8 text", 0
    yield (
        "binary lines",
        "z.jsonl",
        b'{"text": "a"}\n"a\xe9\xfe"\n{"text": "b"}',
        1,
        "z.jsonl:2: byte 2 is not UTF-8",
        2,
    )
    yield "changing schema", "z.jsonl", numbers, 4, "z.jsonl:41: 'text' is 7: expected a string", 41
    yield (
        "truncated gzip",
        "z.jsonl.gz",
        gzip.compress(lines + noise.hex().encode())[:-900],
        None,
        "undamaged file",
        None,
    )
    yield "truncated zstd", "z.jsonl.zst", zstandard.compress(lines)[:-9], 1, "undamaged file", None
    yield "truncated xz", "z.txt.xz", lzma.compress(lines)[:-30], 1, "expected a whole, undamaged file", 0
    yield "not gzip", "z.txt.gz", b"plain", 1, "expected a whole, undamaged file", 0
    yield "truncated Parquet", "z.parquet", content[:-20], 1, "expected a whole, undamaged file", 0
    yield "a damaged row group", "z.parquet", grouped(1), 1, "z.parquet:11: ", 20
    yield "a row that is not UTF-8", "z.parquet", not_utf8(), 1, "z.parquet:2: 'text' cannot be read", 2
    yield "damaged text", "z.parquet", grouped(0, in_text=True), 1, "z.parquet:1: ", 20
    yield "a damaged last row group", "z.parquet", grouped(2), 1, "from there to 30 in an undamaged row group", 20
    yield "a null row", "z.parquet", content, 1, "z.parquet:10: 'text' is None: expected a string", 14
    yield "no column", "z.parquet", columns.getvalue().to_pybytes(), 1, "expected a column 'text'", 0
    yield "truncated JSON", "z.jsonl", b'{"text": "a"}\n{"text": "b', 1, "z.jsonl:2: ", 1
    yield "two compressed texts", "z.txt.xz", lzma.compress(b"one") + lzma.compress(b" text"), 0, None, 1


@pytest.mark.parametrize("case", list(bad_corpora()), ids=lambda case: case[0])
def test_broken_records_are_counted_and_named_and_the_others_stay(case, tmp_path):
    _, name, data, broken, reason, documents = case
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text("\n".join(json.dumps(one) for one in GOOD))
    (tmp_path / "c" / name).write_bytes(data)
    config = DataConfig(corpus=str(tmp_path / "c"), tokenizer="byte", heldout_fraction=0.0, tuning_fraction=0.0)
    counts = made(config, tmp_path / "s")["counts"]
    named = [json.loads(line) for line in (tmp_path / "s" / "broken.jsonl").read_text().splitlines()]
    assert counts["broken"] == len(named)
    if broken is not None:
        assert counts["broken"] == broken
    if documents is not None:
        assert counts["documents"] == len(GOOD) + documents
    assert counts["documents"] >= len(GOOD)
    if reason is not None:
        assert reason in named[0]["reason"] and named[0]["key"].startswith(name)
        assert "\n" not in named[0]["reason"]


def test_files_that_vanish_or_change_between_planning_and_reading_are_named(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    for name in "abcd":
        (tmp_path / "c" / f"{name}.txt").write_text(f"text {name} " * 100)
    config = DataConfig(corpus=str(tmp_path / "c"), tokenizer="byte", heldout_fraction=0.0, tuning_fraction=0.0)
    right = make_store._tokenize_units

    def later(*arguments):
        (tmp_path / "c" / "b.txt").unlink()
        (tmp_path / "c" / "c.txt").write_text("another")
        return right(*arguments)

    monkeypatch.setattr(make_store, "_tokenize_units", later)
    assert made(config, tmp_path / "s")["counts"] | {"bytes": 0, "tokens": 0} == {
        "documents": 2, "broken": 2, "empty": 0, "bytes": 0, "tokens": 0,
    }  # fmt: skip
    reasons = [one["reason"] for one in store.broken_records(tmp_path / "s", 9)]
    assert "b.txt: No such file or directory; expected a file that can be read" in reasons[0]
    assert "c.txt has changed since the store was begun; expected the same file" in reasons[1]


def test_a_line_that_is_too_long_is_skipped_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("orogen.data.readers.MAX_LINE_BYTES", 50)
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n{"text": "b"}\n' % ("x" * 170))
    one, two = read_records(tmp_path / "a.jsonl", "a.jsonl", "text", form=".jsonl")
    assert isinstance(one, Broken) and "a.jsonl:1 has more than 50 bytes" in one.reason
    assert two == Document("a.jsonl:2", "b")


def test_a_text_that_the_tokenizer_would_change_is_left_out_by_name(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    found = tokenizer.encode_documents(["ab", "", "é"])
    assert [ids.tolist() for ids in found] == [[100, 101], [], [198, 172]]


def test_units_without_one_good_document_do_not_stop_the_command(tmp_path, monkeypatch, capsys):
    """One unit per file: one of broken records alone, one without any record, one of good documents."""
    monkeypatch.setattr("orogen.data.make_store.unit_size", lambda total: 1)
    (tmp_path / "c").mkdir()
    for name, data in (("a.txt", b"a\0b"), ("b.jsonl", b"\n\n"), ("c.txt", b"good text")):
        (tmp_path / "c" / name).write_bytes(data)
    file = tmp_path / "data.gin"
    file.write_text(
        f"DataConfig.corpus = {str(tmp_path / 'c')!r}\nDataConfig.tokenizer = 'byte'\n"
        "DataConfig.heldout_fraction = 0.0\nDataConfig.tuning_fraction = 0.0\n"
    )
    command = ["tokenize", "--gin_file", str(file), "--out", str(tmp_path / "s"), "--workers", "1", "--json"]
    assert main(command) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["documents"] == 1 and counts["broken"] == 1
