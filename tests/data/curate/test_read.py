"""What cannot be read is named and passed over; everything else is read."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from orogen.data import readers
from orogen.data.curate import read
from orogen.data.curate.inputs import HTML
from orogen.data.curate.read import SEPARATOR, read_input

from ..test_broken_records import grouped, not_utf8
from .corpora import input_of, warc, write_jsonl


def read_all(path, *, text_field="text", file=None):
    broken = []
    documents = list(read_input(file or input_of(path), text_field=text_field, report=broken.append))
    return documents, [(b.record, b.reason) for b in broken]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_broken_line_is_named_and_every_other_read(name, tmp_path):
    lines = [
        {"text": "one", "url": "u"}, b"{not json", b"", {"other": 1}, {"text": 7}, {"text": ""}, {"text": " \n"},
        {"text": "a\0b"}, b'{"text": "\xff"}', [1], b'{"text": "\\ud800"}', b"\0" * 10, {"text": "two"},
    ]  # fmt: skip
    lines = [json.dumps(line).encode() if not isinstance(line, bytes) else line for line in lines]
    documents, broken = read_all(write_jsonl(tmp_path / name, lines))
    assert [(d.id, d.text, d.metadata) for d in documents] == [
        (f"{name}:1", "one", {"url": "u"}),
        (f"{name}:13", "two", {}),
    ]
    assert broken == [
        ("2", "malformed JSON"), ("4", "no text field"), ("5", "unusable text field"), ("6", "empty text"),
        ("7", "empty text"), ("8", "NUL characters"), ("9", "malformed JSON"), ("10", "no text field"),
        ("11", "unusable text field"), ("12", "malformed JSON"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_of_a_truncated_file_the_whole_lines_are_read(name, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / name, [f"{i:05d} " + str(hash(str(i)) ** 3) for i in range(3000)])
    path.write_bytes(path.read_bytes()[:-300])
    documents, broken = read_all(path)
    assert 0 < len(documents) < 3000 and [d.text[:5] for d in documents] == [f"{i:05d}" for i in range(len(documents))]
    assert broken == [("", "damaged file")]


def test_a_line_at_the_limit_is_read_and_one_beyond_it_is_passed_over(tmp_path, monkeypatch):
    whole = b'{"text": "abcdef"}'
    path = write_jsonl(tmp_path / "a.jsonl", [whole, b'{"text": "' + b"x" * 100 + b'"}', whole])
    for module in (read, readers):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", len(whole) + 1)  # its line feed included
    monkeypatch.setattr(read, "PIECE", 9)
    documents, broken = read_all(path)
    assert [d.id for d in documents] == ["a.jsonl:1", "a.jsonl:3"] and broken == [("2", "too long")]
    monkeypatch.setattr(read, "MAX_LINE_BYTES", len(whole))
    assert read_all(path) == ([], [("1", "too long"), ("2", "too long"), ("3", "too long")])


def test_empty_files_are_named(tmp_path):
    for name, reason in (("a.txt", "empty text"), ("a.jsonl", "empty file"), ("a.warc", "empty file")):
        (tmp_path / name).write_bytes(b"")
        assert read_all(tmp_path / name) == ([], [("", reason)])


def test_a_text_file_is_one_document_and_a_binary_one_is_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße\r\n".encode())
    (tmp_path / "b.txt").write_bytes(b"abc\xff\xfe")
    (tmp_path / "c.txt").write_bytes(b"abc\0def")
    (tmp_path / "d.html").write_bytes(b"<p>x</p>")
    assert [d.text for d in read_all(tmp_path / "a.txt")[0]] == ["Grüße\r\n"]
    assert read_all(tmp_path / "b.txt")[1] == [("", "not UTF-8")]
    assert read_all(tmp_path / "c.txt")[1] == [("", "NUL characters")]
    assert read_all(tmp_path / "d.html")[0][0].metadata == {HTML: True}
    latin = '<html><head><meta charset="iso-8859-1"></head><body><p>Größe „café“</p></body></html>'
    (tmp_path / "e.html").write_bytes(latin.encode("cp1252"))
    assert read_all(tmp_path / "e.html")[0][0].text == latin


def test_a_file_that_vanished_or_changed_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    file = input_of(path)
    write_jsonl(path, ["one", "two"])
    assert read_all(path, file=file) == ([], [("", "changed")])
    path.unlink()
    assert read_all(path, file=file) == ([], [("", "vanished")])


def test_rows_of_parquet_keep_their_other_columns(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, ""], "n": [1, 2, 3]}), path)
    documents, broken = read_all(path)
    assert [(d.id, d.text, d.metadata) for d in documents] == [("a.parquet:1", "one", {"n": 1})]
    assert broken == [("2", "unusable text field"), ("3", "empty text")]
    assert read_all(path, text_field="body") == ([], [("", "no text field")])
    path.write_bytes(path.read_bytes()[:-20])
    assert read_all(path) == ([], [("", "damaged file")])


def test_rows_beside_a_damaged_row_group_are_read(tmp_path):
    (path := tmp_path / "a.parquet").write_bytes(grouped(1))
    documents, broken = read_all(path)
    assert [d.text[:6].strip() for d in documents] == [f"row {i}" for i in (*range(10), *range(20, 30))]
    assert documents[-1].id == "a.parquet:30" and broken == [("11", "damaged rows")]


def test_values_of_other_columns_that_python_cannot_hold_cost_no_text(tmp_path):
    ns, us = pyarrow.timestamp("ns"), pyarrow.timestamp("us")
    times = {"ns": pyarrow.array([1, 2], ns), "far": pyarrow.array([2**62, 0], us)}
    times["inside"] = pyarrow.array([{"a": 1}, None], pyarrow.struct([("a", ns)]))
    parquet.write_table(pyarrow.table({"text": ["one", "two"], **times}), tmp_path / "a.parquet")
    (one, two), broken = read_all(tmp_path / "a.parquet")
    assert not broken and (one.text, two.text, two.metadata["inside"]) == ("one", "two", None)
    assert str(one.metadata["ns"]) == "1970-01-01 00:00:00.000000001" and "out of range" in one.metadata["far"]


def test_a_text_of_parquet_that_is_not_utf8_costs_itself(tmp_path):
    (tmp_path / "a.parquet").write_bytes(not_utf8())
    documents, broken = read_all(tmp_path / "a.parquet")
    assert [d.text for d in documents] == ["good", "last"] and broken == [("2", "damaged rows")]


def test_without_a_field_every_string_of_a_record_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "why?", "c": ["a", {"b": "c"}], "n": 3}])
    assert read_all(path, text_field=None)[0][0].text.split(SEPARATOR) == ["why?", "a", "c"]


def test_without_a_field_no_text_that_cannot_be_read_is_passed_over(tmp_path):
    """Of a benchmark to decontaminate against, which would then not be found."""
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 3)))
    text = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"a\xff\xfe"))
    time = pyarrow.array([1, 2], pyarrow.timestamp("ns"))
    inside = {
        "list": pyarrow.ListArray.from_arrays([0, 1, 2], text),
        "struct": pyarrow.StructArray.from_arrays([text], "s"),
    }
    for name, column in {"plain": text, **inside}.items():
        parquet.write_table(pyarrow.table({"time": time, "q": column}), tmp_path / f"{name}.parquet")
        documents, broken = read_all(tmp_path / f"{name}.parquet", text_field=None)
        assert [d.text.split(SEPARATOR)[-1] for d in documents] == ["a"] and broken == [("2", "damaged rows")], name


PAGE = "<html><body><p>Grüße</p></body></html>"
TYPED = {"WARC-Identified-Payload-Type": "text/html"}


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz"])
def test_pages_of_warc_are_html_and_texts_of_wet_are_not(name, tmp_path):
    path = warc(
        tmp_path / name,
        [
            ("warcinfo", b"software: x", {}),
            ("response", PAGE.encode(), TYPED),
            ("response", PAGE.encode(), {}),
            ("response", b"\x89PNG\r\n\x1a\n" + bytes(40), {}),
            ("response", b"%PDF-1.4", {"WARC-Identified-Payload-Type": "application/pdf"}),
            ("conversion", "Grüße".encode(), {"WARC-Identified-Payload-Type": "text/plain"}),
            ("response", PAGE.encode("latin-1") * 20, TYPED),
            ("response", b"", TYPED),
        ],
    )
    documents, broken = read_all(path)
    assert [(d.id, d.metadata.get(HTML, False)) for d in documents] == [
        (f"{name}:2", True), (f"{name}:3", True), (f"{name}:6", False), (f"{name}:7", True),
    ]  # fmt: skip
    assert [d.text[:31] for d in documents[:3]] == [PAGE[:31], PAGE[:31], "Grüße"] and "Grüße" in documents[3].text
    assert documents[0].metadata["url"] == "http://example.org/1" and broken == [("8", "empty text")]


def test_a_truncated_record_is_no_shorter_page(tmp_path):
    path = warc(tmp_path / "a.warc", [("response", PAGE.encode(), TYPED), ("response", PAGE.encode() * 9, TYPED)])
    path.write_bytes(path.read_bytes()[:-100])
    documents, broken = read_all(path)
    assert [d.id for d in documents] == ["a.warc:1"] and broken == [("2", "truncated record")]


def test_of_a_truncated_or_damaged_archive_the_whole_records_are_read(tmp_path):
    path = warc(tmp_path / "a.warc.gz", [("response", PAGE.encode(), TYPED)] * 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    documents, broken = read_all(path)
    assert len(documents) == 2 and broken == [("", "damaged file")]
    (tmp_path / "b.warc").write_bytes(b"nothing of the kind\r\n\r\n")
    assert read_all(tmp_path / "b.warc") == ([], [("", "damaged file")])


def test_errors_are_no_pages_and_code_in_a_wet_is_text(tmp_path):
    path, pages = tmp_path / "a.warc", [("conversion", b"#!/bin/sh\necho hello\n", {}), ("response", PAGE.encode(), {})]
    warc(path, [*pages, ("conversion", b"{}", {}), ("conversion", b"\x81\xff", {})])
    path.write_bytes(path.read_bytes().replace(b"HTTP/1.0 200 OK", b"HTTP/1.0 404 No"))
    documents, broken = read_all(path)
    assert [(d.id, d.text[:9]) for d in documents] == [("a.warc:1", "#!/bin/sh"), ("a.warc:3", "{}")]
    assert broken == [("4", "not text")]
