"""Documents of one input file. What cannot be read is reported and passed over; nothing in a file ends a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from datatrove.data import Document

from orogen.config.checks import ConfigError
from orogen.config.json_file import parse_json
from orogen.data.compressed import DAMAGE, opened
from orogen.data.curate.inputs import HTML, Input
from orogen.data.readers import MAX_LINE_BYTES, checked_text, parquet_rows
from orogen.data.warc import Page, page_text, read_warc

SEPARATOR = "\x1e"  # the record separator of ASCII
PIECE = 2**20  # bytes at a time of a line too long to keep
SHOWN = 300  # characters of a detail


class Broken(NamedTuple):
    """A record, or with an empty `record` the rest of a file, that could not be read.

    reason: one of few. detail: what is particular to this one.
    """

    file: str
    record: str
    reason: str
    detail: str


class Unreadable(Exception):
    """A record, or the rest of a file, cannot be read: (reason, detail)."""


Report = Callable[[Broken], None]


def read_input(file: Input, *, text_field: str | None, report: Report) -> Iterator[Document]:
    """The documents of a file in order; what is broken goes to `report`.

    text_field: the field that holds the text; None takes every string of a record, with SEPARATOR between them.
    Ids are `source/path:record`, without the record for files that are one document. Metadata are a record's other
    fields. Empty texts and texts with NUL characters are broken, and so is a file whose size is no longer what it was
    when the run began.
    """
    documents = _READERS[file.kind](file, text_field, report)
    while True:
        try:
            document = next(documents, None)
        except Unreadable as error:
            report(Broken(file.key, "", *error.args))
            return
        except FileNotFoundError:
            report(Broken(file.key, "", "vanished", "the file is gone since the run began"))
            return
        except (OSError, *DAMAGE) as error:
            report(Broken(file.key, "", "damaged file", f"the rest is not read: {one_line(error)}"))
            return
        if document is None:
            return
        record = document.id.removeprefix(file.key).removeprefix(":")
        if not document.text.strip():
            report(Broken(file.key, record, "empty text", ""))
        elif "\0" in document.text:
            report(Broken(file.key, record, "NUL characters", "expected text, not binary data"))
        else:
            yield document


def one_line(error: BaseException) -> str:
    """An error's name and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]


def strings(value: object) -> Iterator[str]:
    """Every string within a value of JSON, in order, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def _check_unchanged(file: Input) -> None:
    size = Path(file.path).stat().st_size
    if size != file.size:
        raise Unreadable("changed", f"{size} bytes, and {file.size} when the run began: not read")


def _read_whole(file: Input, text_field: str | None, report: Report) -> Iterator[Document]:
    """A file that is one document: plain text or HTML."""
    del text_field, report
    _check_unchanged(file)
    with opened(Path(file.path)) as stream:
        data = stream.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        raise Unreadable("too long", f"more than {MAX_LINE_BYTES} bytes")
    is_html = file.kind == "html"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not is_html:
            raise Unreadable("not UTF-8", f"byte {error.start}") from error
        text = page_text(data)
    yield Document(text, file.key, metadata={HTML: True} if is_html else {})


def _read_jsonl(file: Input, text_field: str | None, report: Report) -> Iterator[Document]:
    """One document per line; blank lines are none, but count in the numbers of lines."""
    _check_unchanged(file)
    with opened(Path(file.path)) as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                report(Broken(file.key, str(number), "too long", f"more than {MAX_LINE_BYTES} bytes"))
                _skip_line(lines, line)
            elif line.strip():
                try:
                    yield _document(_parse(line), text_field, f"{file.key}:{number}")
                except Unreadable as error:
                    report(Broken(file.key, str(number), *error.args))
        if not number:
            report(Broken(file.key, "", "empty file", ""))


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line, where="the line")
    except ConfigError as error:
        raise Unreadable("malformed JSON", str(error)[:SHOWN]) from None


def _skip_line(lines: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = lines.readline(PIECE)


def _document(record: Any, text_field: str | None, key: str) -> Document:
    """The document of a record. Raises Unreadable."""
    if text_field is None:
        record = {"text": SEPARATOR.join(strings(record))}
    field = "text" if text_field is None else text_field
    if not isinstance(record, dict) or field not in record:
        found = f"an object with {len(record)} others" if isinstance(record, dict) else type(record).__name__
        raise Unreadable("no text field", f"expected a JSON object with {field!r}, not {found}")
    try:
        text = checked_text(record.pop(field), field, where="the record")
    except ConfigError as error:
        raise Unreadable("unusable text field", str(error)[:SHOWN]) from None
    return Document(text, key, metadata=record)


def _read_parquet(file: Input, text_field: str | None, report: Report) -> Iterator[Document]:
    """One document per row. Other columns become metadata."""
    _check_unchanged(file)
    try:
        for number, record in parquet_rows(Path(file.path), text_field, None):
            try:
                if isinstance(record, ConfigError):
                    raise Unreadable("damaged rows", str(record)[:SHOWN])
                yield _document(record, text_field, f"{file.key}:{number}")
            except Unreadable as error:
                report(Broken(file.key, str(number), *error.args))
    except ConfigError as error:
        raise Unreadable("no text field", str(error)[:SHOWN]) from None


def _read_warc(file: Input, text_field: str | None, report: Report) -> Iterator[Document]:
    """One document per page or text. Pages stay HTML. Metadata: url, date, and HTML for pages."""
    del text_field
    _check_unchanged(file)
    number = 0
    for number, found in read_warc(Path(file.path), max_bytes=MAX_LINE_BYTES):
        if isinstance(found, Page):
            metadata: dict[str, Any] = {"url": found.url, "date": found.date}
            if found.is_html:
                metadata[HTML] = True
            yield Document(found.text, f"{file.key}:{number}", metadata=metadata)
        elif found is not None:
            report(Broken(file.key, str(number), found.reason, found.detail[:SHOWN]))
    if not number:
        report(Broken(file.key, "", "empty file", "no record of WARC"))


_READERS: dict[str, Callable[[Input, str | None, Report], Iterator[Document]]] = {
    "txt": _read_whole,
    "html": _read_whole,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "warc": _read_warc,
}
