"""Tokens to text while they come: what can be told of the text so far, and where a stop string ends it."""

import codecs
from collections.abc import Iterable, Mapping, Sequence

from orogen.config.checks import ConfigError
from orogen.data.token_bytes import decoded
from orogen.data.tokenizer import Tokenizer


class Texts:
    """Opens the streams of one tokenizer; made once, for what is shared by them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._own_bytes = frozenset(tokenizer.fallback_of_byte.values())

    def stream(
        self, *, after: Iterable[int] = (), stops: Sequence[str] = (), shown: Iterable[int] = ()
    ) -> "TextStream":
        """The text of tokens that follow the tokens `after`, up to the first of the texts `stops`.

        shown: specials whose names are text here; others add none.
        """
        bytes_v = self._tokenizer.bytes_of_token
        specials = self._tokenizer.specials
        if names := {i: str(specials[i]).encode() for i in shown if i in specials}:
            bytes_v = _Named(bytes_v, names)
        begins = not any(self._tokenizer.bytes_of_token[i] for i in after)
        prefix = self._tokenizer.prefix.decode() if begins else ""
        pieces = _Runs(bytes_v, self._own_bytes, prefix) if self._own_bytes else _Bytes(bytes_v)
        return TextStream(pieces, StopSearch(stops) if stops else None)


class _Named(Sequence[bytes]):
    """The bytes of each token, some of which are others than the tokenizer's."""

    def __init__(self, bytes_v: Sequence[bytes], names: Mapping[int, bytes]) -> None:
        self._bytes_v, self._names = bytes_v, names

    def __len__(self) -> int:
        return len(self._bytes_v)

    def __getitem__(self, place):
        return self._names.get(place) or self._bytes_v[place]


class TextStream:
    """The pieces of one text.

    Together they are `Tokenizer.decode` of all tokens, or what of it precedes the first stop string, however the
    tokens are handed over. `stopped`: a stop string was found, and the text has ended.
    """

    def __init__(self, pieces: "_Bytes | _Runs", search: "StopSearch | None") -> None:
        self._pieces = pieces
        self._search = search

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the text."""
        return None if self._search is None else self._search.found

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop is not None

    def push(self, ids: Iterable[int], *, searched: bool = True) -> str:
        """The text that is certain now, and was not before. Raises ConfigError for an id outside the vocabulary.

        What may still change is held back: bytes of a character that is not complete, the beginning of a stop string
        and, in a vocabulary with byte fallback, a run of byte tokens, which one wrong byte makes U+FFFD as a whole.
        searched: whether a stop string may begin in it; text that is not searched comes before all that is.
        """
        text = self._pieces.push(ids)
        return self._shown(text) if searched else text

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        shown = self._shown(self._pieces.finish())
        return shown if self.stopped or self._search is None else shown + self._search.held

    def _shown(self, text: str) -> str:
        if self._search is None or self.stopped:
            return "" if self.stopped else text
        return self._search.feed(text)


class StopSearch:
    """Finds the stop string that is complete first; of several that are complete at once, the longest.

    Each is followed by Knuth, Morris and Pratt's automaton, whose state is how much of it the text ends in: linear
    time, whatever the text and however it is split. found: it, None before.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = [_failures(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first = frozenset(stop[0] for stop in self._stops)
        self.found: str | None = None

    @property
    def held(self) -> str:
        """The longest end of the text that a stop string begins with."""
        state, stop = max(zip(self._states, self._stops, strict=True))
        return stop[:state]

    def feed(self, text: str) -> str:
        """What this text adds to what is no part of a stop string. Not to be called once one is found."""
        if self._first.isdisjoint(text) and not any(self._states):
            return text  # the usual case, and much faster
        held = max(zip(self._states, self._stops, strict=True))
        for place, character in enumerate(text):
            if (stop := self._read(character)) is not None:
                self.found = stop
                return _without(held, text[: place + 1], len(stop))
        return _without(held, text, max(self._states))

    def _read(self, character: str) -> str | None:
        """The longest stop string that this character completes."""
        longest = None
        for number, stop in enumerate(self._stops):
            state, failures = self._states[number], self._failures[number]
            while state and stop[state] != character:
                state = failures[state - 1]
            state += stop[state] == character
            self._states[number] = state
            if state == len(stop) and (longest is None or state > len(longest)):
                longest = stop
        return longest


def _without(held: tuple[int, str], text: str, length: int) -> str:
    """What is held and the text, less its last `length` characters; what is held is copied as far as it is needed."""
    before, stop = held
    if length <= len(text):
        return stop[:before] + text[: len(text) - length]
    return stop[: before + len(text) - length]


def _failures(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of the longest shorter prefix that it ends in."""
    lengths, length = [0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = lengths[length - 1]
        length += stop[length] == character
        lengths.append(length)
    return lengths


class _Bytes:
    """Pieces of text of a byte-level vocabulary."""

    def __init__(self, bytes_v: Sequence[bytes]) -> None:
        self._bytes_v = bytes_v
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._decoder.decode(b"".join(_bytes_of(ids, self._bytes_v)))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _Runs:
    """Pieces of text of a vocabulary with byte fallback: runs of byte tokens wait for their end."""

    def __init__(self, bytes_v: Sequence[bytes], own_bytes: frozenset[int], prefix: str) -> None:
        self._bytes_v = bytes_v
        self._own_bytes = own_bytes
        self._prefix = prefix
        self._run = bytearray()

    def push(self, ids: Iterable[int]) -> str:
        ids, texts = list(ids), []
        for i, data in zip(ids, _bytes_of(ids, self._bytes_v), strict=True):
            if i in self._own_bytes:
                self._run += data
            elif data:
                texts += [self._ended_run(), data.decode()]
        return self._begun("".join(texts))

    def finish(self) -> str:
        return self._begun(self._ended_run())

    def _ended_run(self) -> str:
        text = decoded(bytes(self._run), one_by_one=True)
        self._run.clear()
        return text

    def _begun(self, text: str) -> str:
        """The text without the space that the tokenizer puts before all of it."""
        if text and self._prefix:
            text, self._prefix = text.removeprefix(self._prefix), ""
        return text


def _bytes_of(ids: Iterable[int], bytes_v: Sequence[bytes]) -> list[bytes]:
    """The bytes of each token. An engine waits for this, so that ids are checked together."""
    ids = list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < len(bytes_v):
        wrong = next(i for i in ids if not 0 <= i < len(bytes_v))
        raise ConfigError(f"token id {wrong}: expected 0 to {len(bytes_v) - 1}")
    return [bytes_v[i] for i in ids]
