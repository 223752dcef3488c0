"""Bodies of `/v1/responses` as bodies of chats: items become messages, and settings get the names that chats have."""

from typing import Any

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, Number, Record, Whole
from orogen.infer.items import ITEM, TOOL, chat_tool, messages_of
from orogen.infer.serve.errors import bad
from orogen.infer.serve.forms import CHAT

_TEXT, _FLAG = (str, None), (bool, None)
_FORMAT = Record({"type": str}, {"schema": (dict, None)})
_CHOICE = Record({"type": str}, {"name": _TEXT, "mode": _TEXT, "tools": ListOf(TOOL)})
# Fields of chats that are the same here. Of the others some have other names, and some ask for several answers.
_SAME = set(CHAT.optional) - {
    "max_tokens", "max_completion_tokens", "n", "logprobs", "tools", "tool_choice", "response_format",
    "reasoning_effort", "stream_options", "add_generation_prompt", "return_token_ids",
}  # fmt: skip
RESPONSE = Record(
    {"input": (str, ListOf(ITEM))},
    {
        **{name: CHAT.optional[name] for name in _SAME},
        "instructions": _TEXT,
        "max_output_tokens": (Whole(1, 2**31 - 1), None),
        "tools": (ListOf(TOOL), None),
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
    try:
        chat["messages"] = list(messages_of(body))
        if body.get("tools"):
            chat["tools"] = [chat_tool(tool, f"tools[{number}]") for number, tool in enumerate(body["tools"])]
    except ConfigError as error:
        raise bad(error) from None
    if "max_output_tokens" in body:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if LOGPROBS in body.get("include", []) or "top_logprobs" in body:
        chat["logprobs"] = True
    if (effort := body.get("reasoning", {}).get("effort")) is not None:
        chat["reasoning_effort"] = effort
    if (form := body.get("text", {}).get("format")) is not None:
        chat["response_format"] = {"type": form["type"], "json_schema": form}
    if "tool_choice" in body:
        chat["tool_choice"] = _choice(body["tool_choice"])
    return chat


def _choice(choice: Any) -> Any:
    """Which tools may be called, in the form of chats."""
    if isinstance(choice, str):
        return choice
    if choice["type"] == "allowed_tools":
        tools = [_choice(tool) for tool in choice.get("tools", [])]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return {"type": choice["type"], "function": {"name": choice.get("name")}}
