"""Bodies of `/v1/responses` as bodies of chats: items become messages, and settings get the names that chats have."""

from collections.abc import Iterator
from typing import Any

from orogen.config.checks import shown
from orogen.config.json_file import ListOf, Number, Record, Whole
from orogen.infer.serve.errors import bad
from orogen.infer.serve.forms import CHAT

_TEXT, _FLAG = (str, None), (bool, None)
_PARTS = ListOf(Record({"type": str}, {"text": _TEXT}))
_ITEM = Record(
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
_FORMAT = Record({"type": str}, {"schema": (dict, None)})
_TOOL = Record({"type": str}, {"name": _TEXT, "description": _TEXT, "parameters": (dict, None)})
_CHOICE = Record({"type": str}, {"name": _TEXT, "mode": _TEXT, "tools": ListOf(_TOOL)})
# Fields of chats that are the same here. Of the others some have other names, and some ask for several answers.
_SAME = set(CHAT.optional) - {
    "max_tokens", "max_completion_tokens", "n", "logprobs", "tools", "tool_choice", "response_format",
    "reasoning_effort", "stream_options", "add_generation_prompt", "return_token_ids",
}  # fmt: skip
RESPONSE = Record(
    {"input": (str, ListOf(_ITEM))},
    {
        **{name: CHAT.optional[name] for name in _SAME},
        "instructions": _TEXT,
        "max_output_tokens": (Whole(1, 2**31 - 1), None),
        "tools": (ListOf(_TOOL), None),
        "tool_choice": (str, _CHOICE, None),
        "text": (Record({}, {"format": (_FORMAT, None)}), None),
        "reasoning": (Record({}, {"effort": _TEXT}), None),
        "include": (ListOf(str), None),
        "stream_options": (dict, None),
        "metadata": (dict, None),
        "max_tool_calls": (Number(), None),  # of tools that a server runs, of which there are none
        "truncation": _TEXT,
        "store": _FLAG,
        "background": _FLAG,
        "previous_response_id": _TEXT,
        "conversation": (str, dict, None),
        "prompt": (dict, None),
    },
)
LOGPROBS = "message.output_text.logprobs"
# What a server that keeps nothing cannot do.
_STATEFUL = {"store": False, "background": False, "previous_response_id": None, "conversation": None, "prompt": None}


def chat_of(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat that asks for the same. Raises HttpError for what is not offered."""
    for name, neutral in _STATEFUL.items():
        if (value := body.get(name, neutral)) != neutral:
            expected = "; expected all of the conversation in input"
            raise bad(f"{name} is {shown(value)}; this server keeps nothing between requests{expected}")
    if (truncation := body.get("truncation", "disabled")) != "disabled":
        raise bad(f"truncation is {shown(truncation)}; expected disabled: no part of the input is left out")
    chat = {name: body[name] for name in body.keys() & _SAME}
    chat["messages"] = list(_messages(body))
    if "max_output_tokens" in body:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if LOGPROBS in body.get("include", []) or "top_logprobs" in body:
        chat["logprobs"] = True
    if (effort := body.get("reasoning", {}).get("effort")) is not None:
        chat["reasoning_effort"] = effort
    if (form := body.get("text", {}).get("format")) is not None:
        chat["response_format"] = {"type": form["type"], "json_schema": form}
    if body.get("tools"):
        chat["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body["tools"])]
    if "tool_choice" in body:
        chat["tool_choice"] = _choice(body["tool_choice"])
    return chat


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool in the form of chats. Raises HttpError."""
    if tool["type"] != "function":
        raise bad(f"{where}.type is {shown(tool['type'])}; expected function: this server runs no tools itself")
    if not tool.get("name"):
        raise bad(f"{where}.name is {shown(tool.get('name'))}; expected a text")
    described = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": described}


def _choice(choice: Any) -> Any:
    """Which tools may be called, in the form of chats."""
    if isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        tools = [_choice(tool) for tool in choice.get("tools", [])]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return {"type": choice["type"], "function": {"name": choice.get("name")}}


def _messages(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of a body. What an assistant thought, said and called in a row is one message."""
    if "instructions" in body:
        yield {"role": "system", "content": body["instructions"]}
    items = body["input"]
    if isinstance(items, str):
        yield {"role": "user", "content": items}
        return
    if not items:
        raise bad("input is []; expected at least one item")
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
    """What one item is as a message, of which it may be a part. Raises HttpError."""
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
    raise bad(f"{where}.type is {shown(kind)}; expected {kinds}")


def _field(item: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        raise bad(f"{where}.{name} is missing; expected a text")
    return item[name]


def _text(content: Any, where: str) -> str:
    if content is None:
        raise bad(f"{where} is missing; expected a text")
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part["type"] not in ("input_text", "output_text", "text") or part.get("text") is None:
            raise bad(f"{where}[{number}].type is {shown(part['type'])}; expected input_text or output_text")
    return "\n".join(part["text"] for part in content)
