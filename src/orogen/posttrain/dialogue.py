"""Episodes as token sequences: what the model reads before each of its turns, and what it said."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orogen.data.tokenizer import Tokenizer
from orogen.infer.answer import Answer
from orogen.infer.chat import Chat
from orogen.infer.messages import check_messages
from orogen.infer.tool_calls import schemas_of
from orogen.posttrain.environments.interface import Example, Said


class Opened(NamedTuple):
    """What the model continues. thinks: as `Answer` takes it."""

    ids: list[int]
    thinks: bool | None


class Plain:
    """Messages as plain text, one per line, for models without a chat template. Calls of tools are blocks
    <tool_call>…</tool_call>, and outputs stand in lines of their own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.shown: tuple[int, ...] = ()

    def open(self, example: Example, messages: Sequence[dict[str, Any]], before: list[int] | None) -> Opened:
        """before: the ids so far, after which only the messages since the model's last turn are new."""
        if before is None:
            return Opened(self._tokenizer.prompt_ids("\n".join(map(_plain, messages))), False)
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        text = "".join(f"\n{message['content']}" for message in messages[last + 1 :]) + "\n"
        return Opened([*before, *self._tokenizer.encode_inside(text).tolist()], False)


def _plain(message: dict[str, Any]) -> str:
    """A message of a task: its text, then its calls. Its thoughts are left out."""
    calls = [{key: call["function"][key] for key in ("name", "arguments")} for call in message.get("tool_calls", ())]
    return message["content"] + "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)


class Templated:
    """Messages by a chat template."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self.shown = chat.shown_ids()

    def open(self, example: Example, messages: Sequence[dict[str, Any]], before: list[int] | None) -> Opened:
        """As `Plain.open`; the template renders the whole conversation."""
        prompt = self._chat.prompt(_checked(messages), tools=list(example.tools))
        return Opened(prompt.ids, prompt.thinks)


def _checked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As of a server's request: calls have arguments as text there. Raises ConfigError for those that no JSON file may
    have, such as lone surrogates or deep nesting."""
    return check_messages([_asked(message) for message in messages])


def _asked(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def said_of(text: str, opened: Opened, tools: Sequence[Mapping[str, Any]]) -> Said:
    """What the model said, taken apart."""
    answer = Answer(thinks=opened.thinks, tools=schemas_of(tools) if tools else None)
    parts = [*answer.push(text), *answer.finish()]
    return Said(
        text, "".join(part.content for part in parts), "".join(part.reasoning for part in parts),
        tuple((part.call.name, part.call.arguments) for part in parts if part.call is not None),
    )  # fmt: skip


def message_of(said: Said) -> dict[str, Any]:
    """The assistant's message, as chat templates take it."""
    found: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.reasoning:
        found |= {"reasoning_content": said.reasoning, "thinking": said.reasoning}
    if said.calls:
        found["tool_calls"] = [
            {"id": None, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
            for name, arguments in said.calls
        ]
    return found
