"""A conversation as token sequences whose loss is on what the assistant says."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.packing import Stream
from orogen.infer.chat import THOUGHT, Chat

ASSISTANT, USER = "assistant", "user"
REASONING = ("reasoning_content", "thinking")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as `infer.messages.check_messages` gives them, and the tools that they may call.

    cut_thoughts: the numbers of the messages whose thought was cut short: the model must not learn to end it.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    cut_thoughts: frozenset[int] = frozenset()

    @property
    def text(self) -> str:
        """All that distinguishes it, as one text."""
        return json.dumps({"messages": list(self.messages), "tools": list(self.tools)}, ensure_ascii=False)


def sequences(conversation: Conversation, chat: Chat) -> list[Stream]:
    """The token sequences of a conversation: one, or one per user turn if the template renders earlier turns otherwise
    once a new one begins.

    The loss is on each assistant message from where it departs from the opened turn that the model would continue, up
    to the end of its last special token or text. A turn that is in several sequences has it in the first. Raises
    ConfigError for a template that rewrites the prompt of a message after its answer.
    """
    found: list[_Rendered] = []
    for end in _turn_ends(conversation.messages):
        rendered = _render(conversation, end, chat)
        if found and rendered.continues(found[-1]):
            rendered = rendered.with_spans_of(found[-1])
            found[-1] = rendered
        else:
            found.append(rendered)
    return [one.stream() for one in found]


def answer(conversation: Conversation, first: int, chat: Chat) -> Stream:
    """The whole conversation as one sequence whose loss is on what the assistant says from message `first` on, as
    `sequences` has it. The user says nothing there. Raises ConfigError as `sequences` does."""
    return _render(conversation, len(conversation.messages) - 1, chat, first=first).stream()


class _Rendered:
    """The ids of a conversation up to a message, and the spans of them that are learned."""

    def __init__(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]):
        self.ids, self.spans = list(ids), list(spans)

    def continues(self, before: "_Rendered") -> bool:
        return self.ids[: len(before.ids)] == before.ids

    def with_spans_of(self, before: "_Rendered") -> "_Rendered":
        return _Rendered(self.ids, [*before.spans, *self.spans])

    def stream(self) -> Stream:
        weights_t = np.zeros(len(self.ids), np.float32)
        for start, stop in self.spans:
            weights_t[start:stop] = 1
        return Stream(np.array(self.ids, np.int32), weights_t)


def _turn_ends(messages: Sequence[dict[str, Any]]) -> Iterator[int]:
    """The number of the last message of the assistant before each message of the user, and before the end."""
    last = None
    for number, message in enumerate(messages):
        if message["role"] == USER and last is not None:
            yield last
            last = None
        if message["role"] == ASSISTANT:
            last = number
    if last is not None:
        yield last


def _render(conversation: Conversation, end: int, chat: Chat, *, first: int = 0) -> _Rendered:
    """The conversation up to message `end`, learning the assistant's messages since the user spoke last, but none
    before `first`."""
    messages = list(conversation.messages)
    users = [number for number in range(end) if messages[number]["role"] == USER]
    begin = max(users[-1] + 1 if users else 0, first)
    ids = _ids(conversation, end + 1, chat)
    spans = []
    for number in range(begin, end + 1):
        if messages[number]["role"] != ASSISTANT:
            continue
        before = _ids(conversation, number, chat) if number else []
        after = ids if number == end else _ids(conversation, number + 1, chat)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ConfigError(
                f"the chat template renders messages[:{number + 1}] otherwise once others follow; expected one that "
                "changes no message within a user's turn"
            )
        start = max(len(before), _common(ids, _opened(conversation, number, chat)))
        spans += _learned(conversation, number, ids, (start, len(after)), chat)
    return _Rendered(ids, spans)


def _ids(conversation: Conversation, count: int, chat: Chat) -> list[int]:
    messages, tools = list(conversation.messages[:count]), list(conversation.tools)
    return chat.prompt(messages, tools=tools, generate=False).ids


def _opened(conversation: Conversation, number: int, chat: Chat) -> list[int]:
    """What the model continues when it writes message `number`."""
    messages, tools = list(conversation.messages[:number]), list(conversation.tools)
    return chat.prompt(messages, tools=tools, generate=True).ids if number else []


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of equal ids at the beginning."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def _learned(
    conversation: Conversation, number: int, ids: Sequence[int], span: tuple[int, int], chat: Chat
) -> list[tuple[int, int]]:
    """The parts of a span to learn: without what the template puts after the end of the turn, and without the end of a
    thought that was cut short."""
    start, stop = span
    specials = chat.tokenizer.specials
    while stop > start and ids[stop - 1] not in specials and not chat.tokenizer.decode([ids[stop - 1]]).strip():
        stop -= 1
    if number not in conversation.cut_thoughts:
        return [(start, stop)]
    marker = chat.tokenizer.marker_ids(THOUGHT)
    for place in range(start, stop - len(marker) + 1):
        if list(ids[place : place + len(marker)]) == marker:
            return [(start, place), (place + len(marker), stop)]
    return [(start, stop)]


def without_reasoning(conversation: Conversation) -> Conversation:
    """The conversation without what the assistant thought."""
    stripped = [{k: v for k, v in message.items() if k not in REASONING} for message in conversation.messages]
    return dataclasses.replace(conversation, messages=stripped)


def cut_short(conversation: Conversation, share: float, chat: Chat) -> Conversation:
    """The conversation with the first `share` of each thought's tokens, in whole characters."""
    messages, cut = [], set()
    for number, message in enumerate(conversation.messages):
        thought = message.get(REASONING[0])
        if thought:
            ids = chat.tokenizer.encode(thought)
            kept = chat.tokenizer.decode(ids[: int(share * len(ids))].tolist()).rstrip("\ufffd")
            message = {**message, **{key: kept for key in REASONING if key in message}}
            cut.add(number)
        messages.append(message)
    return dataclasses.replace(conversation, messages=messages, cut_thoughts=frozenset(cut))
