"""Documents from files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, alone or in a folder."""

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import parse_json
from orogen.data.zstd import ZstdFrames

# Errors that a damaged file raises.
DAMAGE = (EOFError, ValueError, zlib.error, gzip.BadGzipFile)
MAX_LINE_BYTES = 2**28  # of a .jsonl: bounds the memory that a small file can expand to


class Document(NamedTuple):
    """One text and its permanent name: its path in the corpus, with `:line` or `:row` inside a file."""

    key: str
    text: str


def read_documents(path: str | Path, *, text_field: str) -> Iterator[Document]:
    """The documents of a file, or of every supported file below a folder, in the order of their paths.

    Files of other kinds in a folder are skipped; `unread_files` counts them.
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
    """Whether any file that `read_documents` would read has fields: all but .txt do."""
    return any(_suffix(file) != ".txt" for file in _supported_files(Path(path)))


def unread_files(path: str | Path) -> int:
    """The number of entries below a folder that `read_documents` skips: files of other kinds, links to folders, broken
    links, and entries that are not files."""
    root = Path(path)
    files, others = walk(root)
    return sum(_suffix(file) is None for file in files) + len(others)


def linked_folders(path: str | Path) -> int:
    """The number of those that are links to folders. They are not followed: a link may lead back to its own folder."""
    return sum(other.is_dir() for other in walk(Path(path))[1])


def read_text(file: Path) -> str:
    """A file's text exactly, line endings included. Raises ConfigError if it is not UTF-8."""
    return _decode(file.read_bytes(), where=str(file))


def _supported_files(root: Path) -> list[Path]:
    if not root.exists():
        raise FileNotFoundError(f"corpus {str(root)!r} does not exist: expected 'stdlib', a file or a folder")
    files = [file for file in _files(root) if _suffix(file) is not None]
    if not files:
        links = f" ({count} links to folders are not followed)" if (count := linked_folders(root)) else ""
        raise ConfigError(f"corpus {str(root)!r} has no file to read{links}: expected {', '.join(_READERS)}")
    return files


def _files(root: Path) -> list[Path]:
    return walk(root)[0]


def walk(root: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder in the order of their paths, or the file itself, and the entries that are neither file
    nor folder.

    A link to a file counts as a file; a link to a folder does not count as a folder. Raises OSError for a folder that
    cannot be listed.
    """
    if not root.is_dir():
        return [root], []
    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=_raise):
        found += [Path(folder, name) for name in files]
        found += [link for name in folders if (link := Path(folder, name)).is_symlink()]
    found.sort(key=lambda f: f.relative_to(root).as_posix())
    return [f for f in found if f.is_file()], [f for f in found if not f.is_file()]


def _raise(error: OSError) -> None:
    raise error


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
    """One document per line; blank lines are not documents, but count in the line numbers of keys and messages."""
    with open_lines(file) as lines:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ConfigError(f"{file}:{number} has more than {MAX_LINE_BYTES} bytes; expected a shorter line")
            if line.strip():
                yield Document(f"{key}:{number}", _text_of_line(line, text_field, where=f"{file}:{number}"))


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


@contextlib.contextmanager
def open_lines(file: Path) -> Iterator[io.BufferedIOBase]:
    """Opens a file's bytes, decompressed if its name ends in .gz or .zst. Reading raises one of DAMAGE if it is not
    whole."""
    if file.name.endswith(".zst"):
        with file.open("rb") as stream, io.BufferedReader(ZstdFrames(stream)) as lines:
            yield lines
    elif file.name.endswith(".gz"):
        with gzip.open(file, "rb") as lines:
            yield lines
    else:
        with file.open("rb") as lines:
            yield lines


def _read_parquet(file: Path, key: str, text_field: str) -> Iterator[Document]:
    import pyarrow  # here, because importing it takes longer than reading most corpora

    try:
        yield from _rows(file, key, text_field)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    except OSError as error:  # pyarrow's own, which have no errno, mean a damaged file
        raise error if error.errno else ValueError(str(error)) from error


def _rows(file: Path, key: str, text_field: str) -> Iterator[Document]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if text_field not in names:
            raise ConfigError(f"{file}: found the columns {shown(names)}: expected a column {text_field!r}")
        number = 0
        for chunk in table.iter_batches(columns=[text_field]):
            for value in chunk.column(0).to_pylist():
                number += 1
                yield Document(f"{key}:{number}", checked_text(value, text_field, where=f"{file}:{number}"))


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
