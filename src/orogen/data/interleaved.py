"""Documents of text and images: pairs of an image and its caption, and longer interleaved ones.

| source | a document |
|---|---|
| .jsonl | a line: {"image": path, "caption": text}, or {"images": [path or null, …], "texts": [text or null, …]}, lists of equal length in whose places one of the two is null (the form of OBELICS, arXiv:2306.16527); paths are relative to the file |
| .parquet | a row with the same fields; an image is its bytes, or {"bytes": …, "path": …} as Hugging Face datasets store it |
| .tar | WebDataset: files that share a name up to its first dot: one image and .txt or .caption, or a .json with the fields of a line, whose images are the endings of files of the document, such as "0.jpg" |

A folder is read file by file, by name. Paths that lead out of the folder are refused.
"""  # noqa: E501

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError, is_unicode, shown
from orogen.config.json_file import ListOf, Record, fits, parse_json
from orogen.data.readers import damage_named

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXT_ENDINGS = ("txt", "caption")
FORMS = (".jsonl", ".parquet", ".tar")
ROWS = 64  # of a Parquet file that are in memory at a time
MAX_BYTES = 100_000_000  # of an image's file, or of any file in an archive
_PAIR = Record({"image": object, "caption": str})
_LISTS = Record({"images": ListOf(object), "texts": ListOf((str, None))})


class Interleaved(NamedTuple):
    """A document. key: where it was read; parts: text, or the bytes of an image's file, in order."""

    key: str
    parts: tuple[str | bytes, ...]

    @property
    def caption(self) -> str | None:
        """The text, if it is a pair of an image and a text."""
        pair = len(self.parts) == 2 and isinstance(self.parts[0], bytes) and isinstance(self.parts[1], str)
        return str(self.parts[1]) if pair else None


def read_interleaved(corpus: str | Path) -> Iterator[Interleaved]:
    """The documents of a file, or of a folder's files in the order of their names. Raises ConfigError for one that is
    malformed, naming its place; whether an image can be decoded is not looked at. Of a file of more than MAX_BYTES, as
    many bytes and one more are read, which `transforms.decode` refuses."""
    root = Path(corpus)
    if not root.exists():
        raise ConfigError(f"corpus {str(corpus)!r} does not exist; expected a {', '.join(FORMS)} file or a folder")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.suffix in FORMS)
    if not files or files[0].suffix not in FORMS:
        raise ConfigError(f"corpus {str(corpus)!r} has no file that ends in {', '.join(FORMS)}; expected one")
    for file in files:
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        yield from READERS[file.suffix](file, name)


def read_image(file: Path, what: str) -> bytes:
    """The bytes of an image's file, or of a pipe. what: its name in the error. Raises ConfigError for more than
    MAX_BYTES."""
    data = _first_bytes(file)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{what} has more than {MAX_BYTES:,} bytes; expected no more")
    return data


def _first_bytes(file: Path) -> bytes:
    """At most MAX_BYTES + 1."""
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _jsonl(file: Path, name: str) -> Iterator[Interleaved]:
    folder = file.parent.resolve()

    def load(path: Any, where: str) -> bytes:
        if not isinstance(path, str):
            raise ConfigError(f"{where}: an image is {shown(path)}; expected the path of a file")
        try:
            target = (folder / path).resolve()
        except ValueError as error:  # a NUL, or a lone surrogate
            raise ConfigError(f"{where}: image {path!r} is no path ({error}); expected the path of a file") from error
        if not target.is_relative_to(folder):
            raise ConfigError(f"{where}: image {path!r} is outside the folder of the file; expected a path inside it")
        if not target.is_file():
            raise ConfigError(f"{where}: image {path!r} does not exist; expected a file")
        return _first_bytes(target)

    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}:{number}"
                yield _document(f"{name}:{number}", parse_json(line, where=where), load, where)


def _parquet(file: Path, name: str) -> Iterator[Interleaved]:
    def load(value: Any, where: str) -> bytes:
        found = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(found, bytes):
            raise ConfigError(f"{where}: an image is {shown(value)}; expected bytes, or an object with bytes")
        return found

    for number, row in enumerate(_rows(file), 1):
        yield _document(f"{name}:{number}", row, load, f"{file}, row {number}")


def _rows(file: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with (
            damage_named(pyarrow.ArrowException),
            parquet.ParquetFile(file, page_checksum_verification=True) as table,
        ):
            for batch in table.iter_batches(batch_size=ROWS):
                yield from batch.to_pylist()
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; expected a Parquet file") from error


def _tar(file: Path, name: str) -> Iterator[Interleaved]:
    """Read from front to back, as a stream: the files of a document follow one another."""
    try:
        with tarfile.open(file, "r|*") as archive:
            key, members = None, {}
            for member in archive:
                if not member.isfile():
                    continue
                stem, _, ending = member.name.rpartition("/")[2].partition(".")
                found = f"{member.name.rpartition('/')[0]}/{stem}".lstrip("/")
                if found != key:
                    if members:
                        yield _from_members(f"{name}:{key}", members, f"{file}, {key}")
                    key, members = found, {}
                ending = ending.lower()
                if member.size > MAX_BYTES and ending.rpartition(".")[2] not in IMAGE_ENDINGS:
                    raise ConfigError(
                        f"{file}: {member.name} has {member.size:,} bytes; expected at most {MAX_BYTES:,}"
                    )
                stream = archive.extractfile(member)
                members[ending] = b"" if stream is None else stream.read(MAX_BYTES + 1)
            if members:
                yield _from_members(f"{name}:{key}", members, f"{file}, {key}")
    except tarfile.TarError as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}; expected a tar archive") from error


def _from_members(key: str, members: Mapping[str, bytes], where: str) -> Interleaved:
    def load(ending: Any, where: str) -> bytes:
        if ending not in members:
            raise ConfigError(f"{where}: image {shown(ending)} is not there; expected one of {', '.join(members)}")
        return members[ending]

    if "json" in members:
        facts = parse_json(members["json"], where=where)
        if fits(facts, _LISTS):
            return _document(key, facts, load, where)
    images = [ending for ending in members if ending in IMAGE_ENDINGS]
    texts = [ending for ending in members if ending in TEXT_ENDINGS]
    if len(images) != 1 or (not texts and "json" not in members):
        raise ConfigError(f"{where}: it has the files {', '.join(members)}; expected one image, and .txt or .json")
    if texts:
        facts = {"image": images[0], "caption": _text(members[texts[0]], where)}
    else:
        facts = parse_json(members["json"], where=where)
        facts = {"image": images[0], **facts} if isinstance(facts, dict) else facts
    return _document(key, facts, load, where)


def _document(key: str, facts: Any, load: Any, where: str) -> Interleaved:
    """load: (value, where) -> the bytes of an image's file."""
    if fits(facts, _PAIR) and facts["image"] is not None:
        return _valid(Interleaved(key, (load(facts["image"], where), facts["caption"])), where)
    if not fits(facts, _LISTS) or len(facts["images"]) != len(facts["texts"]):
        known = sorted(facts) if isinstance(facts, dict) else type(facts).__name__
        raise ConfigError(
            f"{where}: it has {shown(known)}; expected image and caption, or images and texts, lists of equal length"
        )
    parts = []
    for place, (image, text) in enumerate(zip(facts["images"], facts["texts"], strict=True)):
        if (image is None) == (text is None):
            raise ConfigError(f"{where}: place {place} has both or neither of image and text; expected one of them")
        parts.append(load(image, where) if text is None else text)
    return _valid(Interleaved(key, tuple(parts)), where)


def _valid(document: Interleaved, where: str) -> Interleaved:
    """Raises ConfigError for a name or a text that UTF-8 cannot hold."""
    for text in (document.key, *document.parts):
        if isinstance(text, str) and not is_unicode(text):
            raise ConfigError(f"{where}: {shown(text)} has a lone surrogate; expected valid Unicode")
    return document


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: its text is not UTF-8 at byte {error.start}; expected UTF-8") from error


READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".tar": _tar}
