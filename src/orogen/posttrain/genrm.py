"""Generative reward models: two answers shown to a judge, what it writes about them, and rewards of both.

No command runs it: these are functions for environments of one's own.
The judge is a chat model whose template has roles for the answers, as Qwen3-Nemotron-235B-A22B-GenRM's. It writes a
JSON object with the helpfulness of each answer, 1 to 5, and a ranking, 1 (the first is much better) to 6 (the second).
Sources: Nemotron 3 Nano report, section 3; NeMo Gym, resources_servers/genrm_compare.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.posttrain.conversations import USER

ANSWERS = ("response_1", "response_2")  # roles of a judge's messages
PRINCIPLE = "principle"  # the role of what answers are judged by, for templates that have it
NOTHING = "None"  # in place of an answer without text
SCORES, RANKS, EVEN = (1, 5), (1, 6), 3.5
FORMAT_PENALTY, RANKING_WEIGHT = 10.0, 1.0  # C1 and C2


class Judgement(NamedTuple):
    """What a judge says of two answers: the helpfulness of each, from 1 to 5, and their ranking, from 1 to 6."""

    score_1: float
    score_2: float
    ranking: float


class Match(NamedTuple):
    """A judgement of the answers with these two numbers, the first and the second that the judge was shown."""

    first: int
    second: int
    judgement: Judgement


def judge_messages(
    history: Sequence[Mapping[str, Any]], answers: tuple[str, str], *, principle: str | None = None
) -> list[dict[str, Any]]:
    """The messages of a judge's prompt: a conversation that ends with the user, and two texts that answer it.

    Raises ConfigError for another conversation.
    """
    if not history or history[-1].get("role") != USER:
        last = history[-1].get("role") if history else None
        raise ConfigError(f"the conversation to judge ends with {last!r}; expected a message of the user")
    texts = [text if text.strip() else NOTHING for text in answers]
    shown = [{"role": role, "content": text} for role, text in zip(ANSWERS, texts, strict=True)]
    rule = [] if principle is None else [{"role": PRINCIPLE, "content": principle}]
    return [*map(dict, history), *rule, *shown]


def read_judgement(text: str) -> Judgement | None:
    """The judgement in what a judge wrote: the last JSON object with all three numbers in their ranges; None without
    one. What comes before the end of its thought does not count."""
    found = None
    for value in _objects(text.rpartition("</think>")[2]):
        overall = value.get("overall")
        value = overall if isinstance(overall, dict) else value
        numbers = [value.get(name) for name in Judgement._fields]
        limits = (SCORES, SCORES, RANKS)
        if all(_within(n, *bounds) for n, bounds in zip(numbers, limits, strict=True)):
            found = Judgement(*(float(n) for n in numbers if n is not None))
    return found


def _within(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, in order, without those inside others. Text that only begins like one is passed."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def judge_reward(
    text: str, truth: Judgement, *, format_penalty: float = FORMAT_PENALTY, ranking_weight: float = RANKING_WEIGHT
) -> float:
    """The reward of a judge in training, at most 0: R = -C1 · [no judgement] - |P1 - G1| - |P2 - G2| - C2 · |Pr - Gr|
    of what it predicts, P, and the labels, G. Without a judgement nothing is predicted, and R is -C1."""
    found = read_judgement(text)
    if found is None:
        return -format_penalty
    apart = [abs(p - g) for p, g in zip(found, truth, strict=True)]
    return -apart[0] - apart[1] - ranking_weight * apart[2]


def swapped(judgement: Judgement) -> Judgement:
    """The same judgement of the two answers in the other order."""
    return Judgement(judgement.score_2, judgement.score_1, sum(RANKS) - judgement.ranking)


def circular_pairs(count: int) -> list[tuple[int, int]]:
    """The pairs of answers that are judged: each with the next, the last with the first, so that each is shown once as
    the first and once as the second. Raises ValueError for fewer than two answers."""
    if count < 2:
        raise ValueError(f"{count} answers; expected at least 2, to compare")
    return [(number, (number + 1) % count) for number in range(count)]


def rewards_of(matches: Sequence[Match], count: int) -> list[float]:
    """The reward of each of `count` answers: the mean of its scores over its matches. Where a judge gives both answers
    one score, its ranking breaks the tie: s1 += 3.5 - r, s2 += r - 3.5. Raises ValueError for an answer without a
    match."""
    scores: list[list[float]] = [[] for _ in range(count)]
    for first, second, (one, other, ranking) in matches:
        better = EVEN - ranking if one == other else 0.0
        scores[first].append(one + better)
        scores[second].append(other - better)
    if missing := [number for number, found in enumerate(scores) if not found]:
        raise ValueError(f"answer {missing[0]} has no match; expected at least one")
    return [sum(found) / len(found) for found in scores]
