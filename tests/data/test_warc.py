"""Texts of WARC and WET files, whole, compressed and damaged."""

import codecs
import contextlib
import errno
import gzip
import io
import lzma
import random
import re

import pytest
import zstandard

from orogen.config.checks import ConfigError
from orogen.data import gzip_members, warc, warc_stream
from orogen.data.readers import Broken, read_records
from orogen.data.sources import read_documents

pytest.importorskip("fastwarc")


def record(kind, content_type, body, length=None):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a/\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(status, content_type, body, fields=""):
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\n{fields}\r\n".encode()
    return record("response", "application/http; msgtype=response", head + body)


PAGE = (
    "<html><head><title>t</title></head><body><nav><a href='/'>home</a></nav>"
    "<main><p>Größe of a page</p></main></body></html>"
)
INFO = record("warcinfo", "application/warc-fields", b"software: x\r\n")
WET = [
    INFO,
    record("conversion", "text/plain", "erster Text\nzweite Zeile é".encode()),
    record("conversion", "text/plain", b"bad \xff"),
    record("conversion", "text/plain", b"third"),
]
WARC = [
    INFO,
    record("request", "application/http; msgtype=request", b"GET / HTTP/1.1\r\n\r\n"),
    response(200, "text/html; charset=iso-8859-1", PAGE.encode("latin-1")),
    response(404, "text/html", b"<p>not found</p>"),
    response(200, "image/png", b"\x89PNG\0"),
    response(200, "text/plain", b"plain page"),
    record("metadata", "application/warc-fields", b"a: b"),
]


def found(path):
    form = ".wet" if ".wet" in path.name else ".warc"
    return [(r.key.split(":")[-1], r.reason if isinstance(r, Broken) else r.text)
            for r in read_records(path, path.name, "text", form=form)]  # fmt: skip


@pytest.mark.parametrize("packing", ["", ".gz", "whole.gz"])
def test_texts_of_a_wet_have_the_numbers_of_their_records(tmp_path, packing):
    path = tmp_path / f"CC-0.warc.wet{packing[-3:]}"
    data = {"": b"".join(WET), ".gz": b"".join(map(gzip.compress, WET)), "whole.gz": gzip.compress(b"".join(WET))}
    path.write_bytes(data[packing])
    one, bad, three = found(path)
    assert one == ("2", "erster Text\nzweite Zeile é") and three == ("4", "third")
    assert bad[0] == "3" and bad[1].endswith(f"{path.name}:3: byte 4 is not UTF-8: expected UTF-8 text")


def test_pages_give_their_main_text_and_other_records_none(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"".join(WARC))
    assert found(tmp_path / "a.warc") == [("3", "Größe of a page"), ("6", "plain page")]


def test_a_small_corpus_may_be_a_warc_and_stops_at_what_is_broken(tmp_path):
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, WARC)))
    (tmp_path / "b.wet").write_bytes(b"".join(WET))
    documents = read_documents(tmp_path, text_field="text")
    assert [next(documents).key for _ in range(3)] == ["a.warc.gz:3", "a.warc.gz:6", "b.wet:2"]
    with pytest.raises(ConfigError, match="b.wet:3: byte 4 is not UTF-8"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "data", "whole", "reason"),
    [
        ("cut.wet", b"".join(WET)[:-9], 1, "has 0 of the 5 bytes that it announces; expected a whole record"),
        ("cut.wet.gz", b"".join(map(gzip.compress, WET))[:-30], 1, "expected a whole, undamaged file"),
        ("garbage.wet", b"\x00\x01" * 500, 0, "Invalid WARC header after record 0: expected a whole, undamaged file"),
        ("between.wet", WET[1] + b"garbage\r\n\r\n" + WET[3], 2, "2: Invalid WARC header after record 1; expected one"),
        ("length.wet", record("conversion", "text/plain", b"hello", 2) + WET[3], 1, "has a Content-Length that is not"),
        ("empty.wet", b"", 0, None),
    ],
)
def test_damage_is_named_after_the_records_before_it(tmp_path, name, data, whole, reason):
    (tmp_path / name).write_bytes(data)
    records = list(read_records(tmp_path / name, name, "text", form=".wet"))
    broken = [one for one in records if isinstance(one, Broken)]
    good = [one for one in records if not isinstance(one, Broken)]
    assert len(good) == whole
    if reason is None:
        assert not broken
    else:
        assert reason in broken[-1].reason


def chunked(data):
    return b"".join(b"%x\r\n%s\r\n" % (len(data[i : i + 30]), data[i : i + 30]) for i in range(0, len(data), 30)) + (
        b"0\r\n\r\n"
    )


LATIN = {"iso-8859-1": "latin-1", "no-such-set": "utf-8", '"UTF-8"': "utf-8"}


@pytest.mark.parametrize("charset", LATIN)
@pytest.mark.parametrize("kind", ["text/html", "text/plain"])
def test_a_stated_character_set_is_followed_and_an_unknown_one_is_none(tmp_path, kind, charset):
    text = PAGE if kind == "text/html" else "Größe of a page"
    data = response(200, f"{kind}; charset={charset}", text.encode(LATIN[charset]))
    (tmp_path / "a.warc").write_bytes(data + WET[3])
    assert found(tmp_path / "a.warc") == [("1", "Größe of a page"), ("2", "third")]


@pytest.mark.parametrize("damaged", [False, True])
def test_bodies_are_decoded_and_a_damaged_one_is_named(tmp_path, damaged):
    body = gzip.compress(PAGE.encode())[: -9 if damaged else None]
    fields = "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    data = response(200, "text/html", chunked(body), fields)
    (tmp_path / "a.warc").write_bytes(data + WET[3])
    first, last = found(tmp_path / "a.warc")
    assert last == ("2", "third")
    assert "expected a whole body in the coding 'gzip'" in first[1] if damaged else first == ("1", "Größe of a page")


def test_a_response_without_a_status_is_named(tmp_path):
    (tmp_path / "a.warc").write_bytes(record("response", "application/http", PAGE.encode()) + WET[3])
    first, last = found(tmp_path / "a.warc")
    assert "a.warc:1: has no status of HTTP" in first[1] and last == ("2", "third")


FIRST, THIRD = (record("conversion", "text/plain", text) for text in (b"first", b"third"))
WRONG = {
    "short": record("conversion", "text/plain", b"second", 2),
    "long": record("conversion", "text/plain", b"second", 99),
    "beyond the end": record("conversion", "text/plain", b"second", 10**6),
    "more than a text may have": record("conversion", "text/plain", b"second", 10**12),
    "negative": record("conversion", "text/plain", b"second", -5),
    "no number": record("conversion", "text/plain", b"second", "x"),
    "none": record("conversion", "text/plain", b"second").replace(b"Content-Length: 6\r\n", b""),
    "of a request": record("request", "application/http", b"GET", 1),
    "garbage": bytes(range(256)) * 300 + b"\r\n",
    "no type": record("conversion", "text/plain", b"second").replace(b"WARC-Type: conversion\r\n", b""),
}


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_record_costs_itself_alone(tmp_path, wrong, packing):
    """Whatever its length says: the records behind it are read, with their numbers, and no part of it is a text."""
    mention = record("conversion", "text/plain", b"about\nWARC/1.0\r\nWARC-Type: x\r\n")
    data = FIRST + WRONG[wrong] + THIRD + WRONG[wrong] + mention + THIRD
    (tmp_path / f"a.wet{packing}").write_bytes(gzip.compress(data) if packing else data)
    records = found(tmp_path / f"a.wet{packing}")
    assert [number for number, _ in records] == ["1", "2", "3", "4", "5", "6"]
    assert [text for _, text in records[::2]] == ["first", "third", "about\nWARC/1.0\r\nWARC-Type: x\r\n"]
    assert records[5][1] == "third" and all("a.wet" in records[k][1] and "expected" in records[k][1] for k in (1, 3))


def test_what_is_kept_for_a_second_look_is_bounded(tmp_path, monkeypatch):
    """A record of more than that, whole or not, does not end the file's reading."""
    monkeypatch.setattr(warc_stream, "MOST_BYTES", 1000)
    long, wrong = (record("conversion", "text/plain", b"x" * 70_000, n) for n in (None, 69_000))
    (tmp_path / "a.wet").write_bytes(FIRST + long + wrong + THIRD)
    assert [(number, text[:5]) for number, text in found(tmp_path / "a.wet") if "expected" not in text] == [
        ("1", "first"), ("2", "xxxxx"), ("4", "third"),
    ]  # fmt: skip


@pytest.mark.parametrize("length", [300_000, 10**6])
def test_a_length_that_runs_further_than_is_kept_hides_no_record_silently(tmp_path, monkeypatch, length):
    """A plain file is read again from there; of a compressed one, the bytes that were not searched are named."""
    monkeypatch.setattr(warc_stream, "MOST_BYTES", 1000)
    texts = [f"text {number} {'x' * 300}" for number in range(1000)]
    wrong = record("conversion", "text/plain", texts[0].encode(), length)
    others = [record("conversion", "text/plain", text.encode()) for text in texts[1:]]
    data = FIRST + wrong + b"".join(others)
    (tmp_path / "a.wet").write_bytes(data)
    one, two, *records = found(tmp_path / "a.wet")
    assert one == ("1", "first") and "a.wet:2: has a Content-Length that is not its length" in two[1]
    assert records == [(str(number + 2), text) for number, text in enumerate(texts) if number]
    for ending, pack in {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}.items():
        (tmp_path / f"a.wet.{ending}").write_bytes(pack(data))
        one, two, *records = found(tmp_path / f"a.wet.{ending}")
        lost = int(re.search(r"no record was looked for in (\d+) bytes behind it", two[1])[1])
        read = [text for _, text in records]
        assert read == texts[len(texts) - len(read) :]
        first = data.index(b"WARC/1.0", data.index(wrong) + lost)
        assert len(read) == data.count(b"WARC/1.0", first)


def test_garbage_behind_a_long_record_is_not_its_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(warc_stream, "MOST_BYTES", 1000)
    data = record("conversion", "text/plain", b"x" * 200_000) + b"\0garbage\r\n" * 9 + THIRD
    for ending, packed in {"": data, ".gz": gzip.compress(data)}.items():
        (tmp_path / f"a.wet{ending}").write_bytes(packed)
        one, two, three = found(tmp_path / f"a.wet{ending}")
        assert one == ("1", "x" * 200_000) and "after record 1; expected one" in two[1] and three == ("3", "third")


def test_an_error_of_the_disk_is_no_damage_of_a_record(tmp_path, monkeypatch):
    class Failing(io.BytesIO):
        failed = False

        def read1(self, size=-1):
            if self.tell() > 50_000 and not self.failed:
                self.failed = True
                raise OSError(errno.EIO, "Input/output error")
            return super().read1(min(size, 2**14) if size > 0 else 2**14)

    stream = Failing(b"".join(WET) * 2000)
    monkeypatch.setattr(warc, "opened", lambda file, **_: contextlib.nullcontext(stream))
    with pytest.raises(OSError, match="Input/output error"):
        for _ in read_records(tmp_path / "a.wet", "a.wet", "text", form=".wet"):
            pass


def test_a_second_look_copies_no_more_than_it_reads():
    stream = warc_stream.KeptStream(io.BytesIO(b"x" * 10**6 + FIRST * 20_000))
    while stream.read(2**20):
        pass
    assert stream.go_on(0)
    held = {id(piece.obj) for piece in stream._again}
    for _ in range(100):
        assert len(stream.read(100)) == 100
    assert {id(piece.obj) for piece in stream._again} == held


@pytest.mark.parametrize("uri", ["<http://a/>", "urn:x", "http://a/"])
def test_a_page_of_another_status_is_none_however_its_address_is_written(tmp_path, uri):
    page = [response(status, "text/html", PAGE.encode()) for status in (404, 200)]
    data = b"".join(page).replace(b"http://a/", uri.encode())
    (tmp_path / "a.warc").write_bytes(data)
    ((number, one),) = ((n, p) for n, p in warc.read_warc(tmp_path / "a.warc", max_bytes=10**6) if p is not None)
    assert number == 2 and one.url == uri.strip("<>")


@pytest.mark.parametrize(
    ("kind", "coding"),
    [("", "utf-8-sig")] + [(k, c) for k in ("text/html", "text/plain") for c in ("utf-8-sig", "utf-16", "utf-16-be")],
)
def test_a_byte_order_mark_wins_over_the_stated_character_set_and_is_removed(tmp_path, kind, coding):
    text = "Größe of a page" if kind == "text/plain" else PAGE
    mark = codecs.BOM_UTF16_BE if coding == "utf-16-be" else b""
    for stated in ("", "; charset=utf-16", "; charset=iso-8859-1"):
        data = response(200, kind + stated, mark + text.encode(coding))
        (tmp_path / "a.warc").write_bytes(data)
        ((_, page),) = warc.read_warc(tmp_path / "a.warc", max_bytes=10**6)
        assert page.text == text and page.is_html == (kind != "text/plain")


def flipped(packed, place):
    return packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :]


DAMAGE = {
    "of its text": lambda packed: flipped(packed, len(packed) // 2),
    "of its checksum": lambda packed: flipped(packed, len(packed) - 6),
    "of its first byte": lambda packed: flipped(packed, 0),
    "of its end": lambda packed: packed[:-12],
    "of its start": lambda packed: packed[30:],
    "of all": lambda packed: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_member_of_gzip_costs_its_own_record(tmp_path, damage):
    """No text is read whose checksum is not that of the file."""
    texts = [random.Random(number).randbytes(300).hex() for number in range(6)]
    members = [gzip.compress(record("conversion", "text/plain", text.encode())) for text in texts]
    members[2] = DAMAGE[damage](members[2])
    (tmp_path / "a.warc.wet.gz").write_bytes(b"\0\0".join(members) + bytes(20_000))
    assert read(tmp_path / "a.warc.wet.gz") == texts[:2] + texts[3:]
    wrong = [(number, text) for number, text in found(tmp_path / "a.warc.wet.gz") if text not in texts]
    assert damage == "of all" or (wrong[0][0] == "3" and "after record 2" in wrong[0][1] and len(wrong) == 1)


def read(path):
    return [one.text for one in read_records(path, path.name, "text", form=".wet") if not isinstance(one, Broken)]


@pytest.mark.parametrize("place", range(1000, 40_000, 3000))
def test_of_a_damaged_member_with_many_records_none_is_read(tmp_path, place):
    """Most flips change a text and are told by the checksum alone, which does not say whose text it is."""
    texts = [random.Random(number).randbytes(9000).hex() for number in range(6)]
    records = [record("conversion", "text/plain", text.encode()) for text in texts]
    many = flipped(gzip.compress(b"".join(records[:5])), place)
    (tmp_path / "a.wet.gz").write_bytes(many + gzip.compress(records[5]))
    assert read(tmp_path / "a.wet.gz") == texts[5:]
    (tmp_path / "a.wet.gz").write_bytes(many)
    assert read(tmp_path / "a.wet.gz") == [] and len(found(tmp_path / "a.wet.gz")) == 1


def test_of_a_member_that_is_cut_off_the_whole_records_are_read(tmp_path):
    texts = [random.Random(number).randbytes(9000).hex() for number in range(5)]
    whole = gzip.compress(b"".join(record("conversion", "text/plain", text.encode()) for text in texts))
    (tmp_path / "a.wet.gz").write_bytes(whole[:-9000])
    assert read(tmp_path / "a.wet.gz") == texts[:4] and "expected a whole" in found(tmp_path / "a.wet.gz")[-1][1]


def test_a_member_longer_than_what_is_held_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gzip_members, "HELD_BYTES", 1000)
    texts = [random.Random(number).randbytes(40_000).hex() for number in range(3)]
    members = [gzip.compress(record("conversion", "text/plain", text.encode())) for text in texts]
    (tmp_path / "a.wet.gz").write_bytes(b"".join(members))
    assert [text for _, text in found(tmp_path / "a.wet.gz")] == texts
    (tmp_path / "a.wet.gz").write_bytes(members[0] + flipped(members[1], 20_000) + members[2])
    first, *_, last = found(tmp_path / "a.wet.gz")
    assert (first[1], last[1]) == (texts[0], texts[2])
