"""What answers a chat with images. The one that there is stands in `vision/answers.py`, which this package does not
import: who starts a server gives it one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

TOKENS = 64  # of an answer to images, unless its request says otherwise


class Seen(NamedTuple):
    """An answer. prompt, tokens: how many; ended: by itself, else at its most tokens; retrieved: captions found for the
    images, with their scores."""

    text: str
    prompt: int
    tokens: int
    ended: bool
    retrieved: list[dict[str, Any]]


# Answers what was said: texts and the bytes of images, in order, with at most so many tokens. Raises ConfigError.
Sees = Callable[[Sequence[str | bytes], int], Seen]
