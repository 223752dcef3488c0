"""Small sources for tests of curation."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from orogen.data.curate.inputs import Input, kind_of

WORDS = [f"w{i}" for i in range(3000)]


def texts(count: int, *, seed: int = 0, words: int = 120) -> list[str]:
    """Texts of random words, no two alike."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


def nearly(text: str, *, seed: int = 0) -> str:
    """The text with one word of the middle replaced: a Jaccard index of 111/121 for 120 words and shingles of 5."""
    words = text.split()
    words[60] = f"new{seed}"
    return " ".join(words)


def write_jsonl(path: Path, documents: list[Any]) -> Path:
    """One line per text, record, or bytes as they are; compressed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        d if isinstance(d, bytes) else json.dumps(d if isinstance(d, dict) else {"text": d}).encode() for d in documents
    ]
    content = b"".join(line + b"\n" for line in lines)
    if path.suffix == ".zst":
        import zstandard

        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def input_of(path: Path) -> Input:
    """The file as a run lists it."""
    kind = kind_of(path.name)
    assert kind is not None
    return Input(0, path.name, str(path), kind, path.stat().st_size)


def warc(path: Path, pages: list[tuple[str, bytes, dict[str, str]]]) -> Path:
    """A WARC file of (type, payload, headers) records; `response` ones get a status line of HTTP."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.name.endswith(".gz"))
        for number, (kind, payload, headers) in enumerate(pages):
            http = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            writer.write_record(
                writer.create_warc_record(
                    f"http://example.org/{number}", kind, payload=io.BytesIO(payload), warc_headers_dict=headers,
                    http_headers=http if kind == "response" else None,
                    warc_content_type="" if kind == "response" else "text/plain",
                )
            )  # fmt: skip
    return path
