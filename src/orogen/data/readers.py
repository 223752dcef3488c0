"""The records of one file: text, JSON lines, Parquet, WARC and WET, plain or compressed; ArrayRecord; tokens.

A reader never stops at a record that it cannot use: it yields a `Broken` in its place. `sources.read_documents` raises
at the first one; `orogen tokenize` counts and names them all.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import parse_json
from orogen.data.compressed import DAMAGE, OPENERS, opened
from orogen.data.tokenized import Tokens, array_records, content_of, indexed_documents

# Both bound the memory that a small compressed file can expand to.
MAX_LINE_BYTES = 2**28  # of a .jsonl
MAX_TEXT_BYTES = 2**31  # of a .txt or a record of a WARC


class Document(NamedTuple):
    """One text and its permanent name: its path in the corpus, with `:line`, `:row` or `:record` inside a file."""

    key: str
    text: str


class Broken(NamedTuple):
    """A record, or the rest of a file, that cannot be used. reason: in one line, with the place and what was
    expected."""

    key: str
    reason: str


class Part(NamedTuple):
    """A part of a file: bytes [start, stop) of a plain .jsonl, beginning with a line, row groups of a Parquet file, or
    records. before: the lines, rows or records in front of it."""

    start: int
    stop: int
    before: int


Record = Document | Tokens | Broken
Reader = Callable[[Path, str, str, Part | None], Iterator[Record]]


def form_of(name: str) -> tuple[str, str] | None:
    """The form of a file of this name, such as ".jsonl", and its compression, such as ".gz" or ""; None: it is of
    another kind."""
    if _ARRAY_RECORD.search(name):
        return ".array_record", ""
    packing = next((packing for packing in OPENERS if name.endswith(packing)), "")
    form = next((form for form in _READERS if name.removesuffix(packing).endswith(form)), None)
    return None if form is None or (packing and form in _NEVER_PACKED) else (form, packing)


def read_records(
    file: Path, key: str, text_field: str, *, form: str, part: Part | None = None, record_dtype: str | None = None
) -> Iterator[Record]:
    """The records of a file whose name in its corpus is `key`. record_dtype: see DataConfig. Raises OSError."""
    read = partial(_read_array_record, dtype=record_dtype) if form == ".array_record" else _READERS[form]
    try:
        yield from read(file, key, text_field, part)
    except ConfigError as error:
        yield Broken(key, str(error))
    except DAMAGE as error:
        yield Broken(key, f"{file}: {error}: expected a whole, undamaged file")


def decode(data: bytes, *, where: str) -> str:
    """The text of UTF-8. Raises ConfigError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} is not UTF-8: expected UTF-8 text") from error


def _read_txt(file: Path, key: str, text_field: str, part: Part | None) -> Iterator[Document | Broken]:
    del text_field, part  # the whole file is one text
    with opened(file) as stream:
        data = stream.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ConfigError(f"{file} has more than {MAX_TEXT_BYTES} bytes; expected a shorter text")
    yield Document(key, decode(data, where=str(file)))


def _read_jsonl(file: Path, key: str, text_field: str, part: Part | None) -> Iterator[Document | Broken]:
    """One document per line; blank lines are not documents, but count in the line numbers of keys and messages."""
    with opened(file) as lines:
        number, stop = 0, None
        if part is not None:
            lines.seek(part.start)
            number, stop = part.before, part.stop
        while (stop is None or lines.tell() < stop) and (line := lines.readline(MAX_LINE_BYTES + 1)):
            number += 1
            where, name = f"{file}:{number}", f"{key}:{number}"
            if len(line) > MAX_LINE_BYTES:
                yield Broken(name, f"{where} has more than {MAX_LINE_BYTES} bytes; expected a shorter line")
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_LINE_BYTES)
            elif line.strip():
                try:
                    yield Document(name, _text_of_line(line, text_field, where=where))
                except ConfigError as error:
                    yield Broken(name, str(error))


def _text_of_line(line: bytes, text_field: str, *, where: str) -> str:
    try:
        record = parse_json(line, where=where)
    except ConfigError as error:
        raise ConfigError(f"{error}: expected one JSON object on the line") from None
    if not isinstance(record, dict) or text_field not in record:
        found = shown(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"{where}: found {found}: expected a JSON object with the field {text_field!r}")
    return checked_text(record[text_field], text_field, where=where)


def checked_text(text: object, text_field: str, *, where: str) -> str:
    """The value of a text field. Raises ConfigError if it is not a string, or not valid Unicode."""
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {text_field!r} is {shown(text)}: expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, which UTF-8 cannot encode
        raise ConfigError(f"{where}: {text_field!r} holds a lone surrogate: expected valid Unicode") from error
    return text


def _read_parquet(file: Path, key: str, text_field: str, part: Part | None) -> Iterator[Document | Broken]:
    for number, record in parquet_rows(file, text_field, part, columns=[text_field]):
        name = f"{key}:{number}"
        try:
            if isinstance(record, ConfigError):
                raise record
            yield Document(name, checked_text(record[text_field], text_field, where=f"{file}:{number}"))
        except ConfigError as error:
            yield Broken(name, str(error))


def parquet_rows(
    file: Path, text_field: str | None, part: Part | None, *, columns: list[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """The rows of a Parquet file by their numbers, from 1; in place of the rest of a row group that is damaged, a
    ConfigError. columns: None reads all. Raises ConfigError without the column `text_field`, ValueError for a file that
    is damaged, OSError."""
    import pyarrow  # here, because importing it takes longer than reading most corpora
    from pyarrow import parquet

    with (
        damage_named(pyarrow.ArrowException),
        parquet.ParquetFile(file, page_checksum_verification=True) as table,
    ):
        names = table.schema_arrow.names
        if text_field is not None and text_field not in names:
            raise ConfigError(f"{file}: found the columns {shown(names)}: expected a column {text_field!r}")
        number, groups = (0, range(table.num_row_groups)) if part is None else (part.before, range(*part[:2]))
        for group in groups:
            end = number + table.metadata.row_group(group).num_rows
            try:
                with damage_named(pyarrow.ArrowException):
                    for chunk in table.iter_batches(columns=columns, row_groups=[group], batch_size=1024):
                        for record in _records(chunk, text_field):
                            number += 1
                            wrong = isinstance(record, ConfigError)
                            yield number, ConfigError(f"{file}:{number}: {record}") if wrong else record
            except ValueError as error:
                expected = f"expected the rows from there to {end} in an undamaged row group"
                yield number + 1, ConfigError(f"{file}:{number + 1}: {error}: {expected}")
            number = end


def _records(chunk: Any, text_field: str | None) -> list[Any]:
    """The rows of a pyarrow.RecordBatch. A value that Python has no type for, such as a time in nanoseconds or a date
    of the year 12,000, becomes its text, or None if it has none. A row is a ConfigError if the column `text_field`,
    or without one any that holds text, cannot be read."""
    import pyarrow

    wrong = (ValueError, OverflowError, pyarrow.ArrowException)

    def value(name: str, scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except wrong as error:
            if name == text_field or (text_field is None and _holds_text(scalar.type)):
                raise ConfigError(f"{name!r} cannot be read ({error}): expected UTF-8 text") from None
            return text(scalar)

    def text(scalar: Any) -> str | None:
        try:
            return scalar.cast(pyarrow.string()).as_py()
        except wrong:
            return None

    def row(number: int) -> Any:
        names = chunk.schema.names
        try:
            return {name: value(name, column[number]) for name, column in zip(names, chunk.columns, strict=True)}
        except ConfigError as error:
            return error

    try:
        return chunk.to_pylist()
    except wrong:
        return [row(number) for number in range(chunk.num_rows)]


def _holds_text(kind: Any) -> bool:
    """Whether values of a pyarrow.DataType are or contain strings."""
    from pyarrow import types

    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return True
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _holds_text(kind.value_type)
    return any(_holds_text(kind.field(number).type) for number in range(kind.num_fields))


@contextlib.contextmanager
def damage_named(kind: type[Exception]) -> Iterator[None]:
    """Makes ValueErrors of one line of pyarrow's errors, of which `kind` is the class."""
    try:
        yield
    except (kind, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # pyarrow's own have none, and mean a damaged file
            raise
        raise ValueError(" ".join(str(error).split())) from error


def _read_warc(file: Path, key: str, text_field: str, part: Part | None) -> Iterator[Document | Broken]:
    from orogen.data.warc import Page, main_text, read_warc  # here, so that only readers of WARC need its library

    del text_field, part
    for number, found in read_warc(file, max_bytes=MAX_TEXT_BYTES):
        name, where = f"{key}:{number}", f"{file}:{number}"
        if isinstance(found, Page):
            try:
                text = main_text(found)
            except ValueError as error:
                yield Broken(name, f"{where}: {error}; expected HTML")
            else:
                yield Document(name, text)
        elif found is not None:
            yield Broken(name, f"{where}: {found.detail}")


def _read_array_record(
    file: Path, key: str, text_field: str, part: Part | None, dtype: str | None = None
) -> Iterator[Record]:
    start, stop = (0, None) if part is None else part[:2]
    for number, record in enumerate(array_records(file, start, stop), start + 1):
        name, where = f"{key}:{number}", f"{file}:{number}"
        try:
            if isinstance(record, ConfigError):
                raise record
            content = content_of(record, field=text_field, dtype=dtype, where=where)
            yield Document(name, decode(content, where=where)) if isinstance(content, bytes) else Tokens(name, content)
        except ConfigError as error:
            yield Broken(name, str(error))


def _read_indexed(file: Path, key: str, text_field: str, part: Part | None) -> Iterator[Record]:
    del text_field
    start, stop = (0, None) if part is None else part[:2]
    for number, found in enumerate(indexed_documents(file, start, stop), start + 1):
        name = f"{key}:{number}"
        yield Broken(name, str(found)) if isinstance(found, ConfigError) else Tokens(name, found)


# TFDS and MaxText number the files of a set behind the ending.
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d{5,}-of-\d{5,})?$")
_READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".warc": _read_warc,
    ".wet": _read_warc,
    ".array_record": _read_array_record,
    ".idx": _read_indexed,
}
_NEVER_PACKED = (".parquet", ".array_record", ".idx")
KINDS = ", ".join([form for form in _READERS if form not in _NEVER_PACKED]) + (
    f" (each also with {', '.join(OPENERS)}), .parquet, .array_record, or .idx with its .bin"
)
