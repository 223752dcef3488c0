"""Texts of WARC and WET files (ISO 28500), by fastwarc; of HTML pages, by resiliparse.

A document is a record of plain text (a WET's `conversion`), or the main text of an HTML page (a `response`). Responses
of other status than 200, records of other types of content, requests and metadata are not documents.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError

HTML = ("text/html", "application/xhtml+xml")


def read_warc(
    stream: Any, file: Path, *, max_bytes: int, damage: tuple[type[Exception], ...]
) -> Iterator[tuple[int, str | bytes | ConfigError]]:
    """The text of each record that has one (of plain text, its bytes), with the record's number in the file, from 1; a
    ConfigError in place of one that cannot be used. damage: errors of a damaged stream, which is read up to
    there. Raises them or ValueError if the file is damaged, and ConfigError without the library."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise ConfigError(f"{file} needs fastwarc and resiliparse; expected pip install 'orogen[warc]'") from None
    kinds = WarcRecordType.conversion | WarcRecordType.resource | WarcRecordType.response
    failure: list[Exception] = []
    kept: Any = _Kept(stream, failure, damage)
    number = 0
    try:
        for record in ArchiveIterator(kept, WarcRecordType.any_type):
            number += 1
            if record.record_type & kinds:
                found = _text(record, f"{file}:{number}", max_bytes)
                if found is not None:
                    yield number, found
    except (OSError, ValueError) as error:
        raise failure[0] if failure else ValueError(f"{error} after record {number}") from None
    if failure:
        raise failure[0]


class _Kept:
    """A stream that ends where it is damaged, and keeps the error: the records before it are whole."""

    def __init__(self, stream: Any, failure: list[Exception], damage: tuple[type[Exception], ...]):
        self._stream, self._failure, self._damage = stream, failure, damage

    def read(self, size: int = -1) -> bytes:
        if self._failure:
            return b""
        try:
            return self._stream.read1(size)  # no more than one block, which the damage is in or not
        except self._damage as error:
            self._failure.append(error)
            return b""

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, place: int) -> None:
        self._stream.seek(place)

    def close(self) -> None:
        self._stream.close()


def _text(record: Any, where: str, max_bytes: int) -> str | bytes | ConfigError | None:
    """The text of a record; None if it is of another kind; ConfigError if it cannot be read."""
    length = record.content_length
    kind = record.http_content_type if record.is_http else (record.headers.get("Content-Type") or "").split(";")[0]
    kind = (kind or "").strip().lower()
    if record.is_http and record.http_headers is not None and record.http_headers.status_code != 200:
        return None
    if kind != "text/plain" and kind not in HTML:
        return None
    if length > max_bytes:
        return ConfigError(f"{where} has {length} bytes; expected at most {max_bytes}")
    data = record.reader.read()
    if len(data) < length:
        return ConfigError(f"{where} has {len(data)} of the {length} bytes that it announces; expected a whole record")
    try:
        return data if kind == "text/plain" else _main_text(data, record.http_charset)
    except ValueError as error:
        return ConfigError(f"{where}: {error}; expected HTML")


def _main_text(data: bytes, charset: str | None) -> str:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    return extract_plain_text(bytes_to_str(data, charset or detect_encoding(data) or "utf-8"), main_content=True)
