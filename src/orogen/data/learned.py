"""A split of texts of which a part is learned: its streams, and what is learned of them as text."""

from collections.abc import Iterator, Sequence
from typing import SupportsIndex

from orogen.data.packing import Stream
from orogen.data.tokenizer import Tokenizer


class LearnedSplit(Sequence[Stream]):
    """The streams of a split, in their order."""

    def __init__(self, streams: Sequence[Stream], tokenizer: Tokenizer):
        self._streams, self._tokenizer = streams, tokenizer

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, index: SupportsIndex) -> Stream:  # type: ignore[override]  # grain indexes by number only
        return self._streams[int(index)]

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of the text that is learned."""
        return sum(len(text) for text in self.texts())

    @property
    def token_count(self) -> int:
        """Tokens of all streams."""
        return sum(len(stream.tokens_t) for stream in self._streams)

    def texts(self) -> Iterator[bytes]:
        """The text that is learned of each stream, in UTF-8."""
        for stream in self._streams:
            yield self._tokenizer.decode_bytes(stream.tokens_t[stream.weights_t > 0])
