"""Messages of a chat as chat templates expect them."""

from typing import Any

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, Record, read_object

_TEXT = (str, None)
_CALL = Record({"function": Record({"name": str, "arguments": str})}, {"id": _TEXT})
_IMAGE = (Record({"url": str}, {"detail": _TEXT}), None)
MESSAGE = Record(
    {"role": str},
    {
        "content": (str, ListOf(Record({"type": str}, {"text": str, "image_url": _IMAGE})), None),
        "reasoning_content": _TEXT,
        "reasoning": _TEXT,
        "tool_calls": (ListOf(_CALL), None),
    },
)
TOOL = Record({"type": str, "function": Record({"name": str}, {"description": _TEXT, "parameters": (dict, None)})})
# Newer models of OpenAI call a system's text a developer's.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def check_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their texts as one string each and the arguments of calls as objects. Raises ConfigError.

    Parts of a text are joined by line ends, as vLLM joins them for templates that expect a text.
    """
    if not messages:
        raise ConfigError("messages is []; expected at least one")
    return [_checked(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _checked(message: dict[str, Any], where: str) -> dict[str, Any]:
    if message["role"] not in ROLES:
        raise ConfigError(f"{where}.role is {shown(message['role'])}; expected one of {', '.join(ROLES)}")
    role = ROLES[message["role"]]
    found: dict[str, Any] = {"role": role, "content": _text(message.get("content"), f"{where}.content")}
    calls = message.get("tool_calls") or []
    if found["content"] is None and role != "assistant":
        raise ConfigError(f"{where}.content is missing; expected a string")
    if role == "assistant":
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning:
            # gpt-oss reads the second name.
            found |= {"reasoning_content": reasoning, "thinking": reasoning}
        if calls:
            found["tool_calls"] = [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)]
        found["content"] = found["content"] or ""
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            found[key] = message[key]
    return found


def _text(content: Any, where: str) -> str | None:
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if part["type"] != "text" or "text" not in part:
            raise ConfigError(f"{where}[{number}].type is {shown(part['type'])}; expected text")
    return "\n".join(part["text"] for part in content)


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    given, place = function["arguments"], f"{where}.function.arguments"
    try:
        # With a limit of its own: within the body it is a string, whose depth nothing has seen.
        arguments = read_object((given or "{}").encode(), where=place)
    except ConfigError as error:
        reason = str(error).removeprefix(place).lstrip(": ")
        raise ConfigError(f"{place} is {shown(given)}; expected a JSON object ({reason})") from None
    return {"id": call.get("id"), "type": "function", "function": {"name": function["name"], "arguments": arguments}}
