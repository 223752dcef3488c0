"""Bodies of HTTP in each coding: decoded, taken as they are where the header lies, refused where they are damaged."""

import gzip
import random
import zlib

import brotli
import pytest
import zstandard

from orogen.config.checks import ConfigError
from orogen.data.http_body import content

TEXT = "Seiten in Stücken, and more of them. ".encode() * 9
LIMIT = 10_000


def chunked(data, size=50):
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%X;x=y\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nTrailer: x\r\n\r\n"


def bare(data):
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACKED = {
    "gzip": gzip.compress(TEXT), "x-gzip": gzip.compress(TEXT[:99]) + gzip.compress(TEXT[99:]),
    "deflate": zlib.compress(TEXT), "br": brotli.compress(TEXT), "zstd": zstandard.compress(TEXT),
}  # fmt: skip


@pytest.mark.parametrize("coding", PACKED)
def test_compression_is_undone_also_below_chunks(coding):
    assert content(PACKED[coding], {"Content-Encoding": coding.upper()}, max_bytes=LIMIT) == TEXT
    headers = {"Content-Encoding": coding, "Transfer-Encoding": "chunked"}
    assert content(chunked(PACKED[coding]), headers, max_bytes=LIMIT) == TEXT
    assert content(chunked(PACKED[coding]), {"Transfer-Encoding": f"{coding}, chunked"}, max_bytes=LIMIT) == TEXT


def test_deflate_may_lack_its_header_and_codings_may_be_stacked():
    assert content(bare(TEXT), {"Content-Encoding": "deflate"}, max_bytes=LIMIT) == TEXT
    twice = gzip.compress(brotli.compress(TEXT))
    assert content(twice, {"Content-Encoding": "br, gzip"}, max_bytes=LIMIT) == TEXT


@pytest.mark.parametrize("coding", [*PACKED, "chunked", "identity", "windows-1252", ""])
def test_a_body_that_is_not_in_the_coding_is_the_content(coding):
    field = "Transfer-Encoding" if coding == "chunked" else "Content-Encoding"
    assert content(TEXT, {field: coding}, max_bytes=LIMIT) == TEXT


@pytest.mark.parametrize("coding", PACKED)
def test_a_part_of_a_compressed_body_is_refused(coding):
    with pytest.raises(ConfigError, match=f"expected a whole body in the coding '{coding}'"):
        content(PACKED[coding][:-9], {"Content-Encoding": coding}, max_bytes=LIMIT)


@pytest.mark.parametrize("body", [chunked(TEXT)[:200], chunked(TEXT).replace(b"32;x=y", b"31;x=y", 3)[60:]])
def test_a_missing_or_shifted_chunk_is_refused_though_it_is_text(body):
    with pytest.raises(ConfigError, match="chunk . is damaged or missing; expected a whole body in the coding"):
        content(chunked(b"first") [:-17] + body, {"Transfer-Encoding": "chunked"}, max_bytes=LIMIT)  # fmt: skip


NOISE = random.Random(0).randbytes(300)


@pytest.mark.parametrize(
    ("fields", "body"),
    [
        ({"Transfer-Encoding": "chunked"}, NOISE),  # the line of its first size is lost
        ({"Transfer-Encoding": "chunked"}, b"3E8\r\n" + TEXT),  # its first chunk is cut off
        ({"Content-Encoding": "gzip"}, gzip.compress(NOISE)[1:]),
        ({"Content-Encoding": "zstd"}, zstandard.compress(NOISE)[1:]),
        ({"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}, chunked(gzip.compress(NOISE))[7:]),
    ],
)
def test_a_damaged_start_does_not_make_a_compressed_body_the_content(fields, body):
    with pytest.raises(ConfigError, match="expected a whole body in the coding"):
        content(body, fields, max_bytes=LIMIT)


@pytest.mark.parametrize("coding", [*PACKED, "chunked"])
def test_a_body_stored_decoded_may_be_in_an_older_character_set(coding):
    text = "Größe und Maß, ".encode("latin-1") * 9
    assert content(text, {"Content-Encoding": coding}, max_bytes=LIMIT) == text


def test_a_body_stored_without_its_chunks_alone_is_decompressed():
    text = TEXT.decode().encode("utf-16")
    fields = {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}
    assert content(gzip.compress(text), fields, max_bytes=LIMIT) == text


@pytest.mark.parametrize("coding", PACKED)
def test_what_a_body_expands_to_is_bounded(coding):
    pack = {"deflate": zlib.compress, "br": brotli.compress, "zstd": zstandard.compress}.get(coding, gzip.compress)
    with pytest.raises(ConfigError, match=f"more than {LIMIT} bytes when it is decoded"):
        content(pack(bytes(10**7)), {"Content-Encoding": coding}, max_bytes=LIMIT)
    assert content(pack(bytes(LIMIT)), {"Content-Encoding": coding}, max_bytes=LIMIT) == bytes(LIMIT)


def test_an_unknown_coding_of_binary_data_is_refused():
    with pytest.raises(ConfigError, match="'compress'"):
        content(b"\x1f\x9d\xff\xff", {"Content-Encoding": "compress"}, max_bytes=LIMIT)
