"""Documents out of files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, alone or in a folder."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from orogen.config.checks import ConfigError

# What gzip and pyarrow raise on a damaged file (pyarrow's errors are ValueErrors).
DAMAGE = (EOFError, ValueError, zlib.error, gzip.BadGzipFile)


class Document(NamedTuple):
    """One text and the name it keeps for ever: its path in the corpus, with `:line` or `:row` inside a file."""

    key: str
    text: str


def read_documents(path: str | Path, *, text_field: str) -> Iterator[Document]:
    """The documents of a file, or of every supported file below a folder, in the order of their paths.

    Files of other kinds in a folder are passed over; `unread_files` counts them.
    Raises FileNotFoundError if `path` does not exist; ValueError, naming file and line, for a folder without a
    supported file, bytes that are not UTF-8, a malformed line, and a missing or non-string text field.
    """
    root = Path(path)
    for file in _supported_files(root):
        key = file.name if root.is_file() else file.relative_to(root).as_posix()
        try:
            yield from _reader(file)(file, key, text_field)
        except ConfigError:
            raise
        except DAMAGE as error:
            raise ConfigError(f"{file}: {error}: expected a whole, undamaged file") from error


def has_fields(path: str | Path) -> bool:
    """Whether a file that `read_documents` would read names its texts: all but .txt do."""
    return any(_suffix(file) != ".txt" for file in _supported_files(Path(path)))


def unread_files(path: str | Path) -> int:
    """How many files below a folder have a suffix that `read_documents` does not read."""
    root = Path(path)
    return sum(_suffix(file) is None for file in _files(root))


def read_text(file: Path) -> str:
    """A file's text exactly, line endings included. Raises ConfigError if it is not UTF-8."""
    return _decode(file.read_bytes(), where=str(file))


def _supported_files(root: Path) -> list[Path]:
    if not root.exists():
        raise FileNotFoundError(f"corpus {str(root)!r} does not exist: expected 'stdlib', a file or a folder")
    files = [file for file in _files(root) if _suffix(file) is not None]
    if not files:
        raise ConfigError(f"corpus {str(root)!r} has no file to read: expected {', '.join(_READERS)}")
    return files


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    return sorted((f for f in root.rglob("*") if f.is_file()), key=lambda f: f.relative_to(root).as_posix())


def _suffix(file: Path) -> str | None:
    return next((suffix for suffix in _READERS if file.name.endswith(suffix)), None)


def _reader(file: Path) -> Callable[[Path, str, str], Iterator[Document]]:
    suffix = _suffix(file)
    assert suffix is not None
    return _READERS[suffix]


def _read_txt(file: Path, key: str, text_field: str) -> Iterator[Document]:
    del text_field  # the whole file is the text
    yield Document(key, read_text(file))


def _read_jsonl(file: Path, key: str, text_field: str) -> Iterator[Document]:
    """A document a line; blank lines are not documents, but count in the line numbers of keys and messages."""
    with _open_lines(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Document(f"{key}:{number}", _text_of_line(line, text_field, where=f"{file}:{number}"))


def _text_of_line(line: bytes, text_field: str, *, where: str) -> str:
    try:
        record = json.loads(_decode(line, where=where))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: {error.msg}: expected one JSON object on the line") from error
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:  # too deep, or an integer of more digits than Python reads
        raise ConfigError(f"{where}: {error}: expected one JSON object on the line") from error
    if not isinstance(record, dict) or text_field not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"{where}: found {found}: expected a JSON object with the field {text_field!r}")
    return _checked_text(record[text_field], text_field, where=where)


def _checked_text(text: object, text_field: str, *, where: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {text_field!r} is {text!r}: expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell a lone surrogate, which no UTF-8 text holds
        raise ConfigError(f"{where}: {text_field!r} holds a lone surrogate: expected valid Unicode") from error
    return text


@contextlib.contextmanager
def _open_lines(file: Path) -> Iterator[Iterable[bytes]]:
    if file.name.endswith(".zst"):
        import zstandard  # here, so that only those who read .zst need it

        try:
            # zstandard's own file object has no line iteration in binary mode
            with io.BufferedReader(zstandard.open(file, "rb")) as lines:
                yield lines
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error
    else:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else file.open("rb") as lines:
            yield lines


def _read_parquet(file: Path, key: str, text_field: str) -> Iterator[Document]:
    from pyarrow import parquet  # here, because importing it takes longer than reading most corpora

    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise ConfigError(f"{file}: found the columns {names}: expected a column {text_field!r}")
        number = 0
        for chunk in table.iter_batches(columns=[text_field]):
            for value in chunk.column(0).to_pylist():
                number += 1
                yield Document(f"{key}:{number}", _checked_text(value, text_field, where=f"{file}:{number}"))


def _decode(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} is not UTF-8: expected UTF-8 text") from error


_READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
}
