"""The documents of a corpus, and their splits: train, held-out and tuning."""

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data.readers import Document
from orogen.data.sources import forms, has_fields, key_in, read_documents, read_text, supported_files

SPLITS = ("train", "heldout", "tuning")

# Tests, installed packages, tables of code points, and one module that is prose in a string literal.
_STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
)
# Written when the interpreter was built or installed: they differ from machine to machine and hold its paths.
_STDLIB_LOCAL = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def corpus_documents(config: DataConfig) -> list[Document]:
    """Every document of the corpus, in the order of the files' paths. Raises ConfigError if there is no text."""
    if config.corpus == "stdlib":
        documents = list(stdlib_documents())
    else:
        _check_fields(config)
        documents = list(read_documents(config.corpus, text_field=config.text_field, record_dtype=config.record_dtype))
    if not any(document.text for document in documents):
        raise ConfigError(
            f"corpus {config.corpus!r} has {len(documents)} documents and no text: expected at least one with text"
        )
    return documents


def corpus_files(config: DataConfig) -> tuple[Path, list[str]]:
    """The corpus's folder or only file, and the keys of its files, in order. Raises as `corpus_documents` does."""
    if config.corpus == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return root, [file.relative_to(root).as_posix() for file in _stdlib_files(root)]
    root = Path(config.corpus)
    _check_fields(config)
    return root, [key_in(root, file) for file in supported_files(root)]


def _check_fields(config: DataConfig) -> None:
    """Raises ConfigError if nothing in the corpus reads a setting."""
    if config.text_field != DataConfig.text_field and not has_fields(config.corpus):
        expected = f"{DataConfig.text_field!r}, since nothing reads it: {config.corpus!r} is plain text without fields"
        raise ConfigError(f"DataConfig.text_field is {config.text_field!r}; expected {expected}")
    if config.record_dtype is not None and ".array_record" not in forms(config.corpus):
        expected = f"None, since nothing reads it: {config.corpus!r} has no ArrayRecord"
        raise ConfigError(f"DataConfig.record_dtype is {config.record_dtype!r}; expected {expected}")


def stdlib_documents() -> Iterator[Document]:
    """The running interpreter's standard library, one document per `.py` file: about 10 MB of Python and English.

    Without tests, encodings, pydoc_data and what the build wrote. The text differs between Python patch
    versions: compare `content_hash` before comparing losses. Licence PSF-2.0.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for file in _stdlib_files(root):
        yield Document(file.relative_to(root).as_posix(), read_text(file))


def _stdlib_files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        local = any(part.startswith(_STDLIB_LOCAL) for part in parts)
        if not local and _STDLIB_LEFT_OUT.isdisjoint(parts):
            yield file


def content_hash(documents: Sequence[Document]) -> str:
    """SHA-256 over keys and texts, in order. Lengths are hashed too, so one text cannot pass for two."""
    digest = hashlib.sha256()
    for document in documents:
        add_to_hash(digest, document.key, document.text.encode())
    return digest.hexdigest()


def add_to_hash(digest: Any, key: str, text: bytes) -> None:
    """Adds a document to the hash."""
    for part in (key_bytes(key), text):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def key_bytes(key: str) -> bytes:
    """The bytes of a key. A file's name need not be UTF-8: Python reads each of its other bytes as a surrogate."""
    return key.encode("utf-8", "surrogateescape")


def split_of(key: str, *, config: DataConfig) -> str:
    """The split of the document with this key: a function of (seed, key) alone, so other documents do not change it."""
    digest = hashlib.sha256(key_bytes(f"{config.seed}:{key}")).digest()
    point = int.from_bytes(digest[:8], "little") / 2**64
    if point < config.heldout_fraction:
        return "heldout"
    # Tuning is taken from the far end: changing one fraction moves no document between the other two splits.
    return "tuning" if point >= 1 - config.tuning_fraction else "train"


def split_documents(documents: Sequence[Document], *, config: DataConfig) -> dict[str, list[Document]]:
    """The documents by split, each in the given order.

    A fraction is the probability that a document falls into the split, so the split's share in bytes is only near it.
    Raises ConfigError if a split with a fraction above 0, or the train split, gets no text.
    """
    by_split: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        by_split[split_of(document.key, config=config)].append(document)
    text_bytes = {name: sum(len(one.text) for one in found) for name, found in by_split.items()}
    check_splits(text_bytes, len(documents), config=config)
    return by_split


def check_splits(size: Mapping[str, int], count: int, *, config: DataConfig) -> None:
    """Raises ConfigError if a split with a fraction above 0, or the train split, has no text. size: of the text of each
    split; count: of all documents."""
    fractions = {"heldout": config.heldout_fraction, "tuning": config.tuning_fraction, "train": 1.0}
    for name, fraction in fractions.items():
        if fraction > 0 and not size[name]:
            advice = "more documents" if name == "train" else f"more documents, or {name}_fraction larger or 0"
            raise ConfigError(
                f"the {name} split of corpus {config.corpus!r} has no text ({count} documents, "
                f"heldout_fraction={config.heldout_fraction}, tuning_fraction={config.tuning_fraction}, "
                f"seed={config.seed}): expected {advice}"
            )
