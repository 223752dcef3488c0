"""Pages and texts of WARC and WET files (ISO 28500), by fastwarc.

A record has a text if it is plain text (a WET's `conversion`, or a page) or HTML (a `response` or `resource`).
Responses of other status than 200, records of other types of content, requests, revisits and metadata have none. The
type is what the archive identified (WARC-Identified-Payload-Type), else what the server stated.
"""

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.data.compressed import opened
from orogen.data.gzip_members import GzipMembers
from orogen.data.http_body import content
from orogen.data.warc_stream import KeptStream

HTML = ("text/html", "application/xhtml+xml")
PLAIN = "text/plain"
_CHARSET = re.compile(r"charset=([^;]+)", re.IGNORECASE)
_MARKUP = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
_SNIFFED = 2**12  # bytes of a page of unknown type
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_MEDIA = re.compile(r"(image|audio|video|font)/|application/(pdf|zip|gzip|x-)")

TRUNCATED, LONG, UNSEARCHED = "truncated record", "too long", "unsearched bytes"
CUT = (TRUNCATED, LONG)  # reasons of a record whose Content-Length may be wrong and run over the records behind it


class Page(NamedTuple):
    """The text of a record, its markup included if it is HTML, and what the record says of its origin."""

    text: str
    is_html: bool
    url: str
    date: str


class Unusable(NamedTuple):
    """A record that should have a text. reason: one of few. detail: what is particular to it, and what was expected."""

    reason: str
    detail: str


_LENGTH = Unusable("malformed record", "has a Content-Length that is not its length; expected the right one")


def read_warc(file: Path, *, max_bytes: int) -> Iterator[tuple[int, Page | Unusable | None]]:
    """Each record by its number in the file, from 1; None for one that is no document. Behind a record that is damaged,
    or longer or shorter than it says, reading goes on with the next one.

    Of a compressed file, MOST_BYTES are kept to be searched again. If a wrong length runs further than that, the
    record's Unusable says how many bytes were not searched, and later numbers do not count the records in them. Raises
    one of DAMAGE if the rest of the file is damaged, OSError if it cannot be read, ConfigError without the library.
    """
    with opened(file, openers={".gz": lambda stream: io.BufferedReader(GzipMembers(stream))}) as stream:
        yield from _records(KeptStream(stream), file, max_bytes)


def _records(kept: Any, file: Path, max_bytes: int) -> Iterator[tuple[int, Page | Unusable | None]]:
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise ConfigError(f"{file} needs fastwarc and resiliparse; expected pip install 'orogen[warc]'") from None
    kinds = WarcRecordType.conversion | WarcRecordType.resource | WarcRecordType.response
    number = 0
    while True:
        # The last record waits until it is known that it is as long as it says.
        start, waiting, error = kept.tell(), [], None
        try:
            for record in ArchiveIterator(kept, WarcRecordType.any_type):
                yield from waiting
                kept.begin(start := record.stream_pos)
                number, is_response = number + 1, record.record_type == WarcRecordType.response
                wanted = record.record_type & kinds or "WARC-Type" not in record.headers
                waiting = [(number, _found(record, is_response=is_response, max_bytes=max_bytes) if wanted else None)]
        except (OSError, ValueError) as raised:
            error = raised
        cut = any(isinstance(found, Unusable) and found.reason in CUT for _, found in waiting)
        if kept.failure is not None:
            yield from [] if cut else waiting  # what is cut off there is named by the failure
            raise kept.failure
        end = kept.end() if waiting else start
        if error is None and (not cut or end is not None):
            yield from waiting
            return
        place = start if end is None else end
        lost, goes_on = kept.lost(place), kept.go_on(place)
        if end is not None:
            yield from waiting
            if goes_on:
                number += 1
                yield number, Unusable("damaged record", f"{error} after record {number - 1}; expected one")
        elif lost:
            yield number, Unusable(UNSEARCHED, f"{_LENGTH.detail}: no record was looked for in {lost} bytes behind it")
        else:
            yield from waiting if cut and not goes_on else [(number, _LENGTH)]
        if kept.failure is not None:
            raise kept.failure
        if not goes_on:
            if end is not None:
                raise ValueError(f"{error} after record {number}")
            return


def page_text(data: bytes, charset: str | None = None) -> str:
    """An HTML page in the character set given or, without one, in that which its bytes or its markup suggest."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    return bytes_to_str(data, charset or detect_encoding(data) or "utf-8")


def main_text(page: Page) -> str:
    """The text without markup. Raises ValueError."""
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(page.text, main_content=True) if page.is_html else page.text


def _found(record: Any, *, is_response: bool, max_bytes: int) -> Page | Unusable | None:
    """What is in a record of a kind that may have a text, or of none."""
    if "WARC-Type" not in record.headers:
        return Unusable("malformed record", "has no WARC-Type; expected one")
    if is_response and (record.is_http or _url(record).lower().startswith(("http:", "https:"))):
        status = record.http_headers.status_code if record.http_headers is not None else None
        if not status:
            return Unusable("malformed record", "has no status of HTTP; expected one, in a record of application/http")
        if status != 200:
            return None
    stated = record.http_content_type if record.is_http else record.headers.get("Content-Type")
    media = (record.headers.get("WARC-Identified-Payload-Type") or stated or "").split(";")[0].strip().lower()
    if media and media != PLAIN and media not in HTML:
        return None
    if record.content_length > max_bytes:
        return Unusable(LONG, f"has {record.content_length} bytes; expected at most {max_bytes}")
    length, data = record.content_length, record.reader.read()
    if len(data) < length:
        expected = f"has {len(data)} of the {length} bytes that it announces; expected a whole record"
        return Unusable(TRUNCATED, expected)
    try:
        if record.is_http:
            data = content(data, record.http_headers, max_bytes=max_bytes)
    except ConfigError as error:
        return Unusable("damaged content", str(error))
    return _page(data, media, record)


def _page(data: bytes, media: str, record: Any) -> Page | Unusable | None:
    from resiliparse.parse.encoding import detect_mime

    data, charset = _unmarked(data, _charset(record))
    is_html = media in HTML if media else _MARKUP.match(data[:_SNIFFED]) is not None
    if not (is_html or media) or (is_html and _MEDIA.match(detect_mime(data))):
        return None
    if is_html:
        text = page_text(data, charset)
    else:
        name = charset or "utf-8"
        try:
            text = data.decode(name)
        except UnicodeDecodeError as error:
            shown = name.upper()
            return Unusable("not text", f"byte {error.start} is not {shown}: expected {shown} text")
    return Page(text, is_html, _url(record), record.headers.get("WARC-Date") or "")


def _url(record: Any) -> str:
    """Some writers, such as wget, follow the grammar of WARC 1.0 to the letter and put it in angle brackets."""
    return (record.headers.get("WARC-Target-URI") or "").removeprefix("<").removesuffix(">")


def _unmarked(data: bytes, charset: str | None) -> tuple[bytes, str | None]:
    """Without a byte order mark, which wins over what is stated. Source: https://encoding.spec.whatwg.org/#decode."""
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :], name
    return data, charset


def _charset(record: Any) -> str | None:
    """Python's name of the character set that a record states; None if it states none, or one that is unknown."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    stated = record.http_headers.get("Content-Type") if record.is_http else record.headers.get("Content-Type")
    found = _CHARSET.search(stated or "")
    return map_encoding_to_html5(found[1].strip("\"' ").lower(), fallback_utf8=False) if found else None
