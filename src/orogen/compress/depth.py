"""Which layers a model can do without: scores of layers, and the layers that stay.

A layer is left out by multiplying its output by zero, so that one compiled program measures every choice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from orogen.config.checks import ConfigError, require
from orogen.config.model import ModelConfig
from orogen.config.prune import PruneConfig

# The numbers of removed layers -> how far the model without them is from the whole one.
Distance = Callable[[Sequence[int]], float]


class Depth(NamedTuple):
    """layers: those that stay, in order; removed: the others, in the order of removal; scores: by layer, when the first
    was removed; None if no scores were asked for."""

    layers: tuple[int, ...]
    removed: tuple[int, ...]
    scores: list[float] | None = None


def check_depth(model: ModelConfig, prune: PruneConfig) -> None:
    """Raises ConfigError for layers that the model does not have."""
    main = model.layers.main
    if prune.num_layers is not None:
        require(prune.num_layers <= len(main), prune, "num_layers", f"at most {len(main)}, the layers of the model")
    for letter, count in (prune.layers or {}).items():
        most = main.count(letter)
        require(count <= most, prune, "layers", f"at most {most} of {letter}, as many as {main!r} has")
    inside = not prune.remove_layers or max(prune.remove_layers) < len(main)
    require(inside, prune, "remove_layers", f"numbers below {len(main)}, the layers of the model")
    require(len(prune.remove_layers) < len(main), prune, "remove_layers", "fewer, so that a layer stays")
    if prune.layers is not None:
        left = sum(prune.layers.get(letter, main.count(letter)) for letter in set(main))
        require(left > 0, prune, "layers", "at least one layer in all")
    if prune.pattern is not None:
        found = _longest(main, prune.pattern)
        expected = f"layers of {main!r} in their order; the nearest is {found!r}"
        require(is_subsequence(main, prune.pattern), prune, "pattern", expected)


def choose_layers(model: ModelConfig, prune: PruneConfig, scores: Sequence[float] | None, distance: Distance) -> Depth:
    """The layers that stay. scores: by layer, unless the distance gives them; of equal ones the first goes first.

    With a pattern and scores that do not change, those layers stay that have the largest sum of scores.
    """
    main = model.layers.main
    if not prune.chooses_layers:
        gone = prune.remove_layers
        return Depth(tuple(n for n in range(len(main)) if n not in gone), gone)
    count = len(main) - _left(main, prune)
    if scores is None:
        scores = [distance([number]) for number in range(len(main))]
    if prune.pattern is not None and not prune.iterative:
        layers = _heaviest(main, prune.pattern, scores)
        gone = sorted(set(range(len(main))) - set(layers), key=lambda number: scores[number])
        return Depth(layers, tuple(gone), list(scores))
    gone, now = [], dict(enumerate(scores))
    for _ in range(count):
        if gone and prune.iterative:
            now = {number: distance([*gone, number]) for number in _candidates(main, prune, gone)}
        gone.append(min(_candidates(main, prune, gone), key=lambda number: now[number]))
    return Depth(tuple(n for n in range(len(main)) if n not in gone), tuple(gone), list(scores))


def check_layer_scores(model: ModelConfig, scores: Sequence[float] | np.ndarray | None, where: str) -> None:
    """Raises ConfigError unless there is a finite score for each layer, or there are none."""
    size = len(model.layers.main)
    if scores is not None and (len(scores) != size or not np.isfinite(scores).all()):
        raise ConfigError(f"{where} has {len(scores)} scores of layers; expected {size} finite ones")


def is_subsequence(text: str, part: str) -> bool:
    """Whether the letters of `part` are in `text` in their order."""
    left = iter(text)
    return all(letter in left for letter in part)


def _left(main: str, prune: PruneConfig) -> int:
    """How many layers stay."""
    if prune.pattern is not None:
        return len(prune.pattern)
    return prune.num_layers or sum(_counts(main, prune).values())


def _counts(main: str, prune: PruneConfig) -> Mapping[str, int]:
    return {letter: main.count(letter) for letter in set(main)} | (prune.layers or {})


def _candidates(main: str, prune: PruneConfig, gone: Sequence[int]) -> list[int]:
    """The layers of which one can go next."""
    left = [number for number in range(len(main)) if number not in gone]
    if prune.num_layers is not None:
        return left
    if prune.pattern is None:
        have, want = [main[number] for number in left], _counts(main, prune)
        return [number for number in left if have.count(main[number]) > want[main[number]]]
    without = lambda number: "".join(main[other] for other in left if other != number)  # noqa: E731
    return [number for number in left if is_subsequence(without(number), prune.pattern)]


def _heaviest(main: str, pattern: str, scores: Sequence[float]) -> tuple[int, ...]:
    """The layers of `main` that spell `pattern` and have the largest sum of scores."""
    sums = np.full((len(pattern) + 1, len(main) + 1), -np.inf)
    sums[0] = 0
    for done, letter in enumerate(pattern, 1):
        for seen in range(1, len(main) + 1):
            taken = sums[done - 1, seen - 1] + scores[seen - 1] if main[seen - 1] == letter else -np.inf
            sums[done, seen] = max(sums[done, seen - 1], taken)
    layers, seen = [], len(main)
    for done in range(len(pattern), 0, -1):
        while sums[done, seen] == sums[done, seen - 1]:
            seen -= 1
        seen -= 1
        layers.append(seen)
    return tuple(reversed(layers))


def _longest(main: str, pattern: str) -> str:
    """The longest common subsequence of both."""
    before = [""] * (len(pattern) + 1)
    for letter in main:
        now = [""]
        for done, wanted in enumerate(pattern, 1):
            grown = before[done - 1] + letter if letter == wanted else ""
            now.append(max(before[done], now[done - 1], grown, key=len))
        before = now
    return before[-1]
