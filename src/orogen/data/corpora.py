"""The documents of a corpus, and their splits: train, held-out and tuning."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.data.sources import Document, has_fields, read_documents, read_text

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
        if config.text_field != DataConfig.text_field and not has_fields(config.corpus):
            expected = (
                f"{DataConfig.text_field!r}, since nothing reads it: {config.corpus!r} is plain text without fields"
            )
            raise ConfigError(f"DataConfig.text_field is {config.text_field!r}; expected {expected}")
        documents = list(read_documents(config.corpus, text_field=config.text_field))
    if not any(document.text for document in documents):
        raise ConfigError(
            f"corpus {config.corpus!r} has {len(documents)} documents and no text: expected at least one with text"
        )
    return documents


def stdlib_documents() -> Iterator[Document]:
    """The running interpreter's standard library, one document per `.py` file: about 10 MB of Python and English.

    Without tests, encodings, pydoc_data and what the build wrote. The text differs between Python patch
    versions: compare `content_hash` before comparing losses. Licence PSF-2.0.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        local = any(part.startswith(_STDLIB_LOCAL) for part in parts)
        if not local and _STDLIB_LEFT_OUT.isdisjoint(parts):
            yield Document("/".join(parts), read_text(file))


def content_hash(documents: Sequence[Document]) -> str:
    """SHA-256 over keys and texts, in order. Lengths are hashed too, so one text cannot pass for two."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (key_bytes(document.key), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


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
    fractions = {"heldout": config.heldout_fraction, "tuning": config.tuning_fraction, "train": 1.0}
    for name, fraction in fractions.items():
        if fraction > 0 and not any(document.text for document in by_split[name]):
            advice = "more documents" if name == "train" else f"more documents, or {name}_fraction larger or 0"
            raise ConfigError(
                f"the {name} split of corpus {config.corpus!r} has no text ({len(documents)} documents, "
                f"heldout_fraction={config.heldout_fraction}, tuning_fraction={config.tuning_fraction}, "
                f"seed={config.seed}): expected {advice}"
            )
    return by_split
