"""What the suites are made of: examples, invented words, and how many items fit into a length."""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.evaluate.likelihood import Row

ONSETS, VOWELS, CODAS = "b d f g h k l m n p r s t v z br dr gr kl pl st tr".split(), "aeiou", ("", "n", "r", "s", "l")
SYLLABLES = [onset + vowel + coda for onset in ONSETS for vowel in VOWELS for coda in CODAS]
BLOCK = 64  # words that are drawn together
PROBE = 32  # items more, by which the growth of a draft is measured


class Question(NamedTuple):
    """A prompt, and the texts that must occur in its continuation of at most `tokens` tokens."""

    prompt: str
    answers: tuple[str, ...]
    tokens: int


class Draft(NamedTuple):
    """A prompt and its answers, in order, before it is known whether they fit."""

    prompt: str
    answers: tuple[str, ...]


def generator(*parts: int | str) -> np.random.Generator:
    """Random numbers that are a function of the parts alone."""
    return np.random.default_rng([part if isinstance(part, int) else zlib.crc32(part.encode()) for part in parts])


def words(rng: np.random.Generator, *, syllables: int = 2) -> Iterator[str]:
    """Endless invented words, each once; they get longer when there are none left of a length."""
    seen: set[str] = set()
    while True:
        before = len(seen)
        # Drawn in blocks, of one size so that words do not depend on how many are taken.
        for row in rng.integers(len(SYLLABLES), size=(BLOCK, syllables)).tolist():
            word = "".join(SYLLABLES[number] for number in row)
            if word not in seen:
                seen.add(word)
                yield word
        syllables += len(seen) - before < BLOCK // 2


def answer_ids(tokenizer: Tokenizer, draft: Draft) -> np.ndarray:
    """The ids of the answers after the prompt: a space before each, commas between them."""
    return tokenizer.encode_inside(" " + ", ".join(draft.answers))


def row_of(tokenizer: Tokenizer, draft: Draft) -> Row:
    """The prompt and its answers, which are asked for."""
    prompt, answer = tokenizer.prompt_ids(draft.prompt), answer_ids(tokenizer, draft)
    tokens_t = np.array([*prompt, *answer.tolist()], np.int32)
    return Row(tokens_t, np.arange(len(tokens_t)) >= len(prompt))


def question_of(tokenizer: Tokenizer, draft: Draft) -> Question:
    """The draft as a question. The continuation has room for twice the answers and a few words around them."""
    return Question(draft.prompt, draft.answers, room(tokenizer, draft))


def room(tokenizer: Tokenizer, draft: Draft) -> int:
    """Tokens of a continuation that is to hold the answers."""
    return 2 * len(answer_ids(tokenizer, draft)) + 16


class Fitted:
    """Drafts with as many items as fit into a length. draw: (random numbers, items) -> a draft; it grows with them.

    size: tokens of a draft with its answer. least: the fewest items. Raises ConfigError if these do not fit.
    """

    def __init__(
        self, name: str, draw: Callable[[np.random.Generator, int], Draft], size: Callable[[Draft], int], *,
        length: int, least: int = 1,
    ):  # fmt: skip
        self._name, self._draw, self._size, self._length, self._least = name, draw, size, length, least
        self._usual: int | None = None

    def make(self, seed: int, number: int) -> Draft:
        """The draft of this number. The most items that fit are looked for once; a later draft starts from there."""
        again = lambda items: self._draw(generator(seed, self._name, self._length, number), items)  # noqa: E731
        if self._usual is None:
            self._usual = self._most(lambda items: self._size(again(items)) <= self._length, again)
        items = self._usual
        while items >= self._least:
            draft = again(items)
            size = self._size(draft)
            if size <= self._length:
                return draft
            items -= max(1, (size - self._length) * items // size)
        raise self._too_short(again)

    def _most(self, fits: Callable[[int], bool], again: Callable[[int], Draft]) -> int:
        """The most items, from a guess by the growth of a draft: a long one takes seconds to draw."""
        if not fits(self._least):
            raise self._too_short(again)
        base, grown = (self._size(again(items)) for items in (self._least, self._least + PROBE))
        guess = self._least + int((self._length - base) * PROBE / max(grown - base, 1))
        step = 1 + guess // 64
        low, high = self._least, max(guess, self._least + 1)
        while fits(high):
            low, high, step = high, high + step, 2 * step
        while low < high - step and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(low, high - step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _too_short(self, again: Callable[[int], Draft]) -> ConfigError:
        return ConfigError(
            f"EvaluateConfig.lengths has {self._length}; expected at least {self._size(again(self._least))} for "
            f"{self._name!r} with this tokenizer"
        )
