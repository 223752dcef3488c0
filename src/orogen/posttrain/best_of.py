"""Best of n: samples several answers to each prompt and keeps the one with the highest reward."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from orogen.infer.answer import Answer
from orogen.infer.chat import Chat, Prompt
from orogen.infer.engine import Engine
from orogen.infer.lines import request_of
from orogen.infer.request import ERROR, SEEDS
from orogen.posttrain.conversations import ASSISTANT, Conversation

# The rewards of conversations that end with an answer, as `RewardModel.score` gives them.
Reward = Callable[[Sequence[Conversation]], Sequence[float]]


class Best(NamedTuple):
    """The answer that was kept. message: of the assistant, None if every answer failed. rewards: of each answer, None
    for one that failed or whose reward is no number; reward: the highest of them."""

    message: dict[str, Any] | None
    reward: float | None
    rewards: tuple[float | None, ...]


def best_of(
    engine: Engine, chat: Chat, conversations: Sequence[Conversation], reward: Reward, *, count: int,
    fields: dict[str, Any], seed: int = 0,
) -> list[Best]:  # fmt: skip
    """The best of `count` answers to each conversation; of equal ones, the first.

    fields: of the requests, as `infer.lines.request_of` takes them, max_tokens among them. Answer k to conversation c
    is drawn with the seed `seed` + c · count + k.
    """
    prompts = [chat.prompt(list(one.messages), tools=list(one.tools)) for one in conversations]
    shown = {"shown": chat.shown_ids()}
    requests = [
        request_of(prompt.ids, fields | shown | {"seed": (seed + number * count + k) % SEEDS})
        for number, prompt in enumerate(prompts)
        for k in range(count)
    ]
    outputs = iter(engine.run(requests))
    answers = [[_message(next(outputs), prompt) for _ in range(count)] for prompt in prompts]
    answered = [
        Conversation([*one.messages, message], one.tools)
        for one, messages in zip(conversations, answers, strict=True)
        for message in messages
        if message is not None
    ]
    rewards = iter(reward(answered))
    return [_best(messages, rewards) for messages in answers]


def write_best(found: Sequence[Best], places: Iterable[dict[str, Any]]) -> bytes:
    """One JSON object per line: the place of the line it answers, the message kept, its reward, and all rewards.
    places: from `chats.places_of`."""
    lines = ({**place, **one._asdict()} for place, one in zip(places, found, strict=True))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _message(outputs: Iterable[Any], prompt: Prompt) -> dict[str, Any] | None:
    """What was generated as a message; None if that failed, or is empty."""
    outputs = list(outputs)
    if outputs[-1].finish == ERROR:
        return None
    split = Answer(thinks=prompt.thinks)
    parts = [*split.push("".join(output.text for output in outputs)), *split.finish()]
    reasoning, content = ("".join(getattr(part, side) for part in parts) for side in ("reasoning", "content"))
    if not reasoning and not content:
        return None
    thought = {"reasoning_content": reasoning, "thinking": reasoning} if reasoning else {}
    return {"role": ASSISTANT, **thought, "content": content}


def _best(messages: Sequence[dict[str, Any] | None], rewards: Iterable[float]) -> Best:
    source = iter(rewards)
    found = [None if message is None else _number(next(source)) for message in messages]
    known = [(value, -place) for place, value in enumerate(found) if value is not None]
    if not known:
        return Best(None, None, tuple(found))
    value, place = max(known)
    return Best(messages[-place], value, tuple(found))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
