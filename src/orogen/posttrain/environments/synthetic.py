"""Small families of tasks with one exact answer, which need no other package.

An answer is what follows the last `Answer:`, or else the whole content, without space around it. `level` sets how many
digits, letters or words a task has.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.interface import Example, Said, Turn, asked, over

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARK = "Answer:"


class Family(NamedTuple):
    """make: (random numbers, level) -> question and answer; fits: whether a text has the form of an answer."""

    make: Callable[[random.Random, int], tuple[str, str]]
    fits: Callable[[str], bool]


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10**digits)


def _addition(rng: random.Random, level: int) -> tuple[str, str]:
    a, b = _number(rng, level), _number(rng, level)
    return f"{a}+{b}=", str(a + b)


def _arithmetic(rng: random.Random, level: int) -> tuple[str, str]:
    """level + 1 numbers joined by +, - and *."""
    text = str(_number(rng, 2))
    for _ in range(level):
        text += f" {rng.choice('+-*')} {_number(rng, 2)}"
    return f"{text} =", str(_value(text.split()))


def _value(words: list[str]) -> int:
    """Of numbers joined by +, - and *, products first."""
    total, term, sign = 0, int(words[0]), 1
    for operator, word in zip(words[1::2], words[2::2], strict=True):
        if operator == "*":
            term *= int(word)
        else:
            total, term, sign = total + sign * term, int(word), 1 if operator == "+" else -1
    return total + sign * term


def _largest(rng: random.Random, level: int) -> tuple[str, str]:
    digits = [rng.randrange(10) for _ in range(level + 1)]
    return f"max {' '.join(map(str, digits))}=", str(max(digits))


def _parity(rng: random.Random, level: int) -> tuple[str, str]:
    bits = [rng.randrange(2) for _ in range(level + 1)]
    return f"xor {''.join(map(str, bits))}=", str(sum(bits) % 2)


def _copy(rng: random.Random, level: int) -> tuple[str, str]:
    word = "".join(rng.choices(LETTERS[:8], k=level))
    return f"copy {word}=", word


def _reversal(rng: random.Random, level: int) -> tuple[str, str]:
    word = "".join(rng.choices(LETTERS[:8], k=level + 1))
    return f"reverse {word}=", word[::-1]


def _sorting(rng: random.Random, level: int) -> tuple[str, str]:
    numbers = [_number(rng, 2) for _ in range(level + 2)]
    return f"sort {' '.join(map(str, numbers))}:", " ".join(map(str, sorted(numbers)))


def _counting(rng: random.Random, level: int) -> tuple[str, str]:
    word = "".join(rng.choices(LETTERS[:4], k=4 * level))
    letter = rng.choice(LETTERS[:4])
    return f"count {letter} in {word}:", str(word.count(letter))


def _is_number(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _is_word(text: str) -> bool:
    return bool(text) and set(text) <= set(LETTERS)


FAMILIES = {
    "addition": Family(_addition, _is_number),
    "arithmetic": Family(_arithmetic, _is_number),
    "largest": Family(_largest, _is_number),
    "parity": Family(_parity, lambda text: text in ("0", "1")),
    "copy": Family(_copy, _is_word),
    "reversal": Family(_reversal, _is_word),
    "sorting": Family(_sorting, lambda text: all(map(_is_number, text.split(" ")))),
    "counting": Family(_counting, _is_number),
}


class Synthetic:
    """Tasks of one family. Raises ConfigError for an unknown family."""

    def __init__(self, config: EnvironmentConfig) -> None:
        if config.family not in FAMILIES:
            raise ConfigError(f"EnvironmentConfig.family is {config.family!r}; expected one of {', '.join(FAMILIES)}")
        self._config, self._family = config, FAMILIES[config.family]

    def __len__(self) -> int:
        return self._config.examples

    def example(self, number: int) -> Example:
        """Task `number`, which its seed decides."""
        config = self._config
        rng = random.Random(f"{config.family} {config.level} {config.seed} {number}")
        question, answer = self._family.make(rng, config.level)
        return asked(str(number), question, answer)

    def start(self, example: Example) -> Any:
        """Nothing."""
        return None

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """1 for the answer, `partial_credit` for another one of its form, else 0."""
        answer = (said.content or said.text).rpartition(MARK)[2].strip()
        if answer == example.secret:
            return over(exact=1.0)
        return over(exact=self._config.partial_credit if self._family.fits(answer) else 0.0)
