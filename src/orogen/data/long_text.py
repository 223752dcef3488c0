"""Splits long texts, on which the `tokenizers` library would run out of memory or panic, into pieces that tokenize like
the whole."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import tokenizers

# Characters that are tokenized together. A word longer than MOST, which natural text does not have, is split: the
# regular expressions of tokenizers 0.23 panic on a run of 10 million spaces (the retry limit of its Oniguruma).
USUAL, MOST = 2**20, 2**22
# Words so near to the end of a window may end elsewhere in the whole text.
MARGIN = 2**10


class Cutter:
    """Finds safe split points, where the tokens on each side do not depend on the other side.

    backend: a tokenizer that adds no space before a text. text_v: the bytes of each token. added: the texts of added
    tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, text_v: Sequence[bytes], added: Sequence[str]) -> None:
        self._backend = backend
        self._text_v = text_v
        self._added = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None
        self._margin = max([MARGIN, *(len(text) for text in added)])

    def pieces(self, text: str) -> Iterator[str]:
        """The text in order, in pieces of about USUAL characters whose tokens together are those of the whole.

        MOST characters without a safe split point are split anyway.
        """
        start = 0
        while len(text) - start > USUAL:
            size = USUAL
            while (end := self._last_offset(text[start : start + size])) is None and size < min(
                MOST, len(text) - start
            ):
                size = min(4 * size, MOST)
            end = min(size, len(text) - start) if end is None else end
            yield text[start : start + end]
            start += end
        if start < len(text) or not text:
            yield text[start:]

    def _last_offset(self, window: str) -> int | None:
        """The last safe split point in a window, above 0 and not near its end."""
        last = len(window) - self._margin
        offsets = self._between_words(window, last)
        for offset in offsets[::-1]:
            if not self._inside_added(window, int(offset)):
                return int(offset)
        return None

    def _between_words(self, window: str, last: int) -> np.ndarray:
        """Safe split points up to `last`, ascending: where words begin, or where no token spans the point."""
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        seen = window if normalizer is None else normalizer.normalize_str(window)
        if len(seen) != len(window):  # the offsets of its words are not those of the text
            return np.array([], np.int64)
        words = [start for _, (start, _) in splitter.pre_tokenize_str(seen)] if splitter is not None else []
        offsets = np.array(words, np.int64) if len(words) > 1 else self._between_pairs(window)
        return offsets[(offsets > 0) & (offsets <= last)]

    def _between_pairs(self, text: str) -> np.ndarray:
        """Split points where no token of the vocabulary holds both the byte before and the byte after."""
        data = np.frombuffer(text.encode(), np.uint8)
        begins = (data & 0xC0) != 0x80  # a character's first byte
        free = np.zeros(len(data), bool)
        free[1:] = ~self._joined[data[:-1], data[1:]] & begins[1:]
        return (np.cumsum(begins) - 1)[free]

    def _inside_added(self, window: str, offset: int) -> bool:
        if self._added is None:
            return False
        low = max(0, offset - self._margin)
        found = self._added.finditer(window, low, offset + self._margin)
        return any(match.start() < offset < match.end() for match in found)

    @cached_property
    def _joined(self) -> np.ndarray:
        """Whether some token holds byte i right before byte j (256, 256)."""
        joined = np.zeros((256, 256), bool)
        for text in self._text_v:
            data = np.frombuffer(text, np.uint8)
            joined[data[:-1], data[1:]] = True
        return joined
