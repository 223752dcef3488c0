"""Documents from the files of a corpus, alone or in a folder; `readers` reads each file."""

import os
from collections.abc import Iterator
from pathlib import Path

from orogen.config.checks import ConfigError
from orogen.data.readers import KINDS, Broken, Document, decode, form_of, read_records
from orogen.data.tokenized import Tokens

# By what a folder is known to be a tokenized store (see `store`), which is read as one and never as files.
MANIFEST, PLAN, TOKENIZER = "manifest.json", "plan.json", "tokenizer"
FORMAT_NAME = "orogen tokens"


def read_documents(path: str | Path, *, text_field: str, record_dtype: str | None = None) -> Iterator[Document]:
    """The documents of a file, or of every supported file below a folder, in the order of their paths.

    Files of other kinds in a folder are skipped; `unread_files` counts them.
    Raises FileNotFoundError if `path` does not exist; ValueError, naming file and line, for a folder without a
    supported file, bytes that are not UTF-8, a malformed line, a missing or non-string text field, and tokens.
    """
    root = Path(path)
    for file in supported_files(root):
        form, _ = form_of(file.name) or ("", "")
        for record in read_records(file, key_in(root, file), text_field, form=form, record_dtype=record_dtype):
            if isinstance(record, Broken):
                raise ConfigError(record.reason)
            if isinstance(record, Tokens):
                raise ConfigError(f"{file} holds tokens, not text; expected a store that `orogen tokenize` makes of it")
            yield record


def has_fields(path: str | Path) -> bool:
    """Whether any file that `read_documents` would read may have fields."""
    return not forms(path).isdisjoint((".jsonl", ".parquet", ".array_record"))


def forms(path: str | Path) -> set[str]:
    """The forms of the files that `read_documents` would read, such as ".jsonl"."""
    return {(form_of(file.name) or ("",))[0] for file in supported_files(Path(path))}


def is_readable(file: Path) -> bool:
    """Whether a file's name says that its records can be read. Git names its indices .idx too, without a .bin."""
    form = form_of(file.name)
    return form is not None and (form[0] != ".idx" or file.with_suffix(".bin").exists())


def unread_files(path: str | Path) -> int:
    """The number of entries below a folder that `read_documents` skips: files of other kinds, links to folders, broken
    links, entries that are not files, and stores, each as one."""
    root = Path(path)
    files, others = walk(root)
    return sum(not is_readable(file) for file in files) + len(others)


def linked_folders(path: str | Path) -> int:
    """The number of those that are links to folders. They are not followed: a link may lead back to its own folder."""
    return sum(other.is_symlink() and other.is_dir() for other in walk(Path(path))[1])


def read_text(file: Path) -> str:
    """A file's text exactly, line endings included. Raises ConfigError if it is not UTF-8."""
    return decode(file.read_bytes(), where=str(file))


def key_in(root: Path, file: Path) -> str:
    """The name of a file in the corpus at `root`, which may be the file itself."""
    return file.name if root == file else file.relative_to(root).as_posix()


def supported_files(root: Path) -> list[Path]:
    """The files of a corpus in the order of their paths. Raises FileNotFoundError, ConfigError if there is none."""
    if not root.exists():
        raise FileNotFoundError(f"corpus {str(root)!r} does not exist: expected 'stdlib', a file or a folder")
    files = [file for file in walk(root)[0] if is_readable(file)]
    if not files:
        links = f" ({count} links to folders are not followed)" if (count := linked_folders(root)) else ""
        raise ConfigError(f"corpus {str(root)!r} has no file to read{links}: expected {KINDS}")
    return files


def walk(root: Path) -> tuple[list[Path], list[Path]]:
    """The files below a folder in the order of their paths, or the file itself, and the other entries: links to
    folders, stores, and what is neither file nor folder.

    A link to a file counts as a file. Neither links to folders nor stores are entered: a store's documents are those of
    some corpus, perhaps of this one, and have splits already. Raises OSError for a folder that
    cannot be listed.
    """
    if not root.is_dir():
        return [root], []
    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=_raise):
        below = [Path(folder, name) for name in folders]
        closed = [path for path in below if path.is_symlink() or is_begun(path) or is_finished(path)]
        folders[:] = [path.name for path in below if path not in closed]
        found += [Path(folder, name) for name in files] + closed
    found.sort(key=lambda f: f.relative_to(root).as_posix())
    return [f for f in found if f.is_file()], [f for f in found if not f.is_file()]


def is_finished(folder: Path) -> bool:
    """Whether a folder is a whole store, not a folder of texts with a manifest.json of its own."""
    if not (folder / MANIFEST).is_file():
        return False
    with (folder / MANIFEST).open("rb") as file:
        return FORMAT_NAME.encode() in file.read(100)


def is_begun(folder: Path) -> bool:
    """Whether a folder is a store that is not whole yet."""
    return not (folder / MANIFEST).is_file() and (folder / PLAN).is_file() and (folder / TOKENIZER).is_dir()


def _raise(error: OSError) -> None:
    raise error
