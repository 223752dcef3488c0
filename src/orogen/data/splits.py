"""The documents of a split as token streams: in memory, of several sources, or some of them."""

import bisect
from collections.abc import Iterator, Sequence
from typing import Protocol, SupportsIndex

import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.packing import Stream, document_stream
from orogen.data.readers import Document
from orogen.data.tokenizer import Tokenizer


class Split(Protocol):
    """Token streams [bos, document, eos] by number."""

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the documents."""
        ...

    @property
    def token_count(self) -> int | None:
        """Tokens of all documents, if that is known without reading them."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Stream: ...

    def texts(self) -> Iterator[bytes]:
        """The text of each document in UTF-8."""
        ...


class TokenizedSplit(Sequence[Stream]):
    """A split as token streams [bos, document, eos]; each document is tokenised on first access, then kept."""

    def __init__(self, documents: Sequence[Document], tokenizer: Tokenizer) -> None:
        self.documents = documents
        self._tokenizer = tokenizer
        self._ids: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        index = int(index)
        if index not in self._ids:
            self._ids[index] = self._encode(self.documents[index])
        return document_stream(self._ids[index], bos_id=self._tokenizer.bos_id, eos_id=self._tokenizer.eos_id)

    def _encode(self, document: Document) -> np.ndarray:
        """Ids that stand for exactly the document's bytes. Raises ConfigError that names the document if there are
        none."""
        try:
            return self._tokenizer.encode_document(document.text)
        except ConfigError as error:
            raise ConfigError(f"document {document.key}: {error}") from error

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(len(document.text.encode()) for document in self.documents)

    @property
    def token_count(self) -> None:
        """Not known: documents are tokenised on demand."""
        return None

    def texts(self) -> Iterator[bytes]:
        """The text of each document in UTF-8."""
        return (document.text.encode() for document in self.documents)


class JoinedSplit(Sequence[Stream]):
    """The documents of several splits, one after the other."""

    def __init__(self, parts: Sequence[Split]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        number = bisect.bisect_right(self._ends, index := int(index))
        return self._parts[number][index - (self._ends[number - 1] if number else 0)]

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the documents."""
        return sum(part.byte_count for part in self._parts)

    @property
    def token_count(self) -> int | None:
        """Tokens of all documents, if that is known without reading them."""
        counts = [part.token_count for part in self._parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    def texts(self) -> Iterator[bytes]:
        """The text of each document in UTF-8."""
        for part in self._parts:
            yield from part.texts()


class Thinned(Sequence[Stream]):
    """`count` documents of a split, evenly spread."""

    def __init__(self, split: Split, count: int) -> None:
        self._split, self._count = split, min(count, len(split))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        return self._split[int(index) * len(self._split) // self._count]
