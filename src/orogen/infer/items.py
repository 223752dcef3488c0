"""Items of OpenAI's Responses as messages of chats, and back."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, Record

_TEXT = (str, None)
_PARTS = ListOf(Record({"type": str}, {"text": _TEXT}))
ITEM = Record(
    {},
    {
        "type": _TEXT,
        "role": str,
        "content": (str, _PARTS, None),
        "summary": (_PARTS, None),
        "name": _TEXT,
        "arguments": _TEXT,
        "call_id": _TEXT,
        "output": (str, _PARTS, None),
    },
)
TOOL = Record({"type": str}, {"name": _TEXT, "description": _TEXT, "parameters": (dict, None)})


def chat_tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool in the form of chats. Raises ConfigError."""
    if tool["type"] != "function":
        raise ConfigError(f"{where}.type is {shown(tool['type'])}; expected function: this server runs no tools itself")
    if not tool.get("name"):
        raise ConfigError(f"{where}.name is {shown(tool.get('name'))}; expected a text")
    described = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": described}


def messages_of(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of a body's `instructions` and `input`. What an assistant thought, said and called in a row is one
    message. Raises ConfigError."""
    if "instructions" in body:
        yield {"role": "system", "content": body["instructions"]}
    items = body["input"]
    if isinstance(items, str):
        yield {"role": "user", "content": items}
        return
    if not items:
        raise ConfigError("input is []; expected at least one item")
    turn: dict[str, Any] = {}
    for number, item in enumerate(items):
        message = _message(item, f"input[{number}]")
        if message["role"] != "assistant":
            if turn:
                yield turn
            turn = {}
            yield message
        elif _begins(turn, message):
            yield turn
            turn = message
        else:
            turn = _joined(turn, message)
    if turn:
        yield turn


def _begins(turn: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether a further part of an assistant's turn is a message of its own: a second text, or a second thought after
    what the first led to."""
    if "reasoning_content" in turn and "reasoning_content" in message:
        return "content" in turn or "tool_calls" in turn
    return "content" in turn and "content" in message


def _joined(turn: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """One message of both; thoughts in a row are lines of one."""
    found = turn | message
    if calls := [*turn.get("tool_calls", []), *message.get("tool_calls", [])]:
        found["tool_calls"] = calls
    if "reasoning_content" in turn and "reasoning_content" in message:
        found["reasoning_content"] = f"{turn['reasoning_content']}\n{message['reasoning_content']}"
    return found


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    """What one item is as a message, of which it may be a part. Raises ConfigError."""
    kind = item.get("type") or "message"
    if kind == "message":
        return {"role": _field(item, "role", where), "content": _text(item.get("content"), f"{where}.content")}
    if kind == "reasoning":
        said = item.get("content") or item.get("summary") or ""
        text = said if isinstance(said, str) else "\n".join(part.get("text") or "" for part in said)
        return {"role": "assistant", "reasoning_content": text}
    if kind == "function_call":
        function = {name: _field(item, name, where) for name in ("name", "arguments")}
        call = {"id": _field(item, "call_id", where), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        output = _text(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": _field(item, "call_id", where), "content": output}
    kinds = "message, reasoning, function_call or function_call_output"
    raise ConfigError(f"{where}.type is {shown(kind)}; expected {kinds}")


def _field(item: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        raise ConfigError(f"{where}.{name} is missing; expected a text")
    return item[name]


def _text(content: Any, where: str) -> str:
    if content is None:
        raise ConfigError(f"{where} is missing; expected a text")
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part["type"] not in ("input_text", "output_text", "text") or part.get("text") is None:
            raise ConfigError(f"{where}[{number}].type is {shown(part['type'])}; expected input_text or output_text")
    return "\n".join(part["text"] for part in content)


def said_items(text: str, reasoning: str, calls: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One turn of the assistant as items: its thought, its text, its calls (call's id, name, arguments)."""
    found: list[dict[str, Any]] = []
    if reasoning:
        summary = [{"type": "summary_text", "text": reasoning}]
        found.append({"type": "reasoning", "id": "rs", "summary": summary})
    if text or not calls:
        part = {"type": "output_text", "text": text, "annotations": []}
        message = {"type": "message", "id": "msg", "role": "assistant", "status": "completed", "content": [part]}
        found.append(message)
    for call_id, name, arguments in calls:
        call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": json.dumps(arguments)}
        found.append({**call, "status": "completed"})
    return found
