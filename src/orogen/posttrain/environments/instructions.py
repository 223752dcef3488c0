"""Instructions that can be checked, in the manner of IFEval (arXiv:2311.07911): the reward is 1 if all are followed.

A task is a line {"key"?: text, "prompt": text, "checks": [{"name": NAME, …arguments}, …]}; see CHECKS for names.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.json_file import ListOf, Record
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.files import lines_of, no_constant
from orogen.posttrain.environments.interface import Example, Said, Turn, asked, over

_TASK = Record({"prompt": str, "checks": ListOf(dict)}, {"key": str})
_PLACEHOLDER, _HIGHLIGHT = re.compile(r"\[[^\[\]]+\]"), re.compile(r"(?<!\*)\*[^*\n]+\*(?!\*)")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _within(count: int, least: int = 0, most: int | None = None) -> bool:
    return least <= count and (most is None or count <= most)


# By name, (text, arguments) -> whether it is followed. Counts take `least` and `most`.
CHECKS: dict[str, Callable[..., bool]] = {
    "words": lambda text, **bounds: _within(len(_words(text)), **bounds),
    "sentences": lambda text, **bounds: _within(len(re.findall(r"[.!?]+(?=\s|$)", text)), **bounds),
    "paragraphs": lambda text, **bounds: _within(len(_paragraphs(text)), **bounds),
    "bullets": lambda text, **bounds: _within(len(re.findall(r"^\s*[*-]\s+\S", text, re.MULTILINE)), **bounds),
    "keyword": lambda text, word, least=1, most=None: _within(_count(text, word), least, most),
    "without": lambda text, word: _count(text, word) == 0,
    "letter": lambda text, letter, least=1, most=None: _within(text.lower().count(letter.lower()), least, most),
    "lowercase": lambda text: text == text.lower(),
    "uppercase": lambda text: text == text.upper(),
    "no_commas": lambda text: "," not in text,
    "starts": lambda text, phrase: text.strip().startswith(phrase),
    "ends": lambda text, phrase: text.strip().endswith(phrase),
    "title": lambda text: re.search(r"<<[^<>\n]+>>", text) is not None,
    "placeholders": lambda text, least=1: len(_PLACEHOLDER.findall(text)) >= least,
    "highlights": lambda text, least=1: len(_HIGHLIGHT.findall(text)) >= least,
    "quoted": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "json": _is_json,
}
# What generated tasks ask for: a text with {} for the number or word, and the check.
ASKED: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Use at most {n} words.", "words", {"most": "n"}),
    ("Use at least {n} words.", "words", {"least": "n"}),
    ("Write in lower case only.", "lowercase", {}),
    ("Use no commas.", "no_commas", {}),
    ("Use the word '{w}'.", "keyword", {"word": "w"}),
    ("Do not use the word '{w}'.", "without", {"word": "w"}),
    ("Begin with '{w}'.", "starts", {"phrase": "w"}),
    ("End with '{w}'.", "ends", {"phrase": "w"}),
)
TOPICS, WORDS = ("rain", "trains", "bread", "the sea", "chess"), ("blue", "quick", "stone", "winter", "lamp")


class Instructions:
    """Raises ConfigError for a malformed file, a task without checks, an unknown check, or unknown arguments."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._tasks = None if config.corpus is None else lines_of(Path(config.corpus), _TASK)
        for number, task in enumerate(self._tasks or (), 1):
            if not task["checks"]:
                raise ConfigError(f"{config.corpus}: checks of task {number} is []; expected at least one")
            try:
                _followed("probe", task["checks"])
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{config.corpus}: checks of task {number}: {error!r}; see CHECKS") from None

    def __len__(self) -> int:
        return self._config.examples if self._tasks is None else len(self._tasks)

    def example(self, number: int) -> Example:
        """Task `number`."""
        if self._tasks is None:
            return _generated(number, self._config)
        task = self._tasks[number]
        return asked(task.get("key") or str(number), task["prompt"], task["checks"])

    def start(self, example: Example) -> Any:
        """Nothing."""
        return None

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """1 if every instruction is followed by an answer that says something, else 0."""
        text = said.content or said.text
        return over(followed=float(bool(text.strip()) and all(_followed(text, example.secret))))


def _followed(text: str, checks: list[dict[str, Any]]) -> list[bool]:
    return [CHECKS[c["name"]](text, **{k: v for k, v in c.items() if k != "name"}) for c in checks]


def _generated(number: int, config: EnvironmentConfig) -> Example:
    rng = random.Random(f"instructions {config.level} {config.seed} {number}")
    lines, checks = [f"Write about {rng.choice(TOPICS)}."], []
    for place in sorted(rng.sample(range(len(ASKED)), k=min(config.level, len(ASKED)))):
        text, name, takes = ASKED[place]
        values = {"n": rng.randrange(2, 12), "w": rng.choice(WORDS)}
        lines.append(text.format(**values))
        checks.append({"name": name, **{argument: values[key] for argument, key in takes.items()}})
    return asked(str(number), " ".join(lines), checks)
