"""A call of a tool that must be made: how it begins, and a grammar that the rest follows.

The grammar is Lark's as llguidance reads it. It ends with the call, before the tag that closes it, which is a special
token of most tokenizers and no text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError, shown
from orogen.infer.grammar_check import SPACES
from orogen.infer.request import Grammar
from orogen.infer.tool_calls import kinds_of, options_of, properties_of

# What no argument's name may have where it stands in a tag of its own line.
_UNNAMEABLE = re.compile(r"[<>\x00-\x1f\x7f-\x9f\u2028\u2029]")
_END = "\n</parameter>\n"
# Ends with the first end of a parameter, so that a value may hold anything else.
_TEXT = f"text[suffix={json.dumps(_END)}]: /(?s:.*)/"


class Beginning(NamedTuple):
    """How a call begins, so far as it is certain, and what follows."""

    text: str
    rest: Grammar


def beginning(tools: Sequence[Mapping[str, Any]], template: str) -> Beginning:
    """The beginning of a call of one of the tools, in the form that a chat template shows.

    Raises ConfigError for names of arguments that this form cannot hold.
    """
    if "<TOOLCALL>" in template:
        begin, middle, end = '<TOOLCALL>[{"name": "', '", "arguments": ', "}]"
    elif "<function=" in template:
        begin, middle, end = "<tool_call>\n<function=", ">\n", "</function>"
    else:
        begin, middle, end = '<tool_call>\n{"name": "', '", "arguments": ', "}"
    named = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if len(named) == 1:
        begin, names = f"{begin}{next(iter(named))}{middle}", [""]
    else:
        names = [_quoted(name + middle) for name in named]
    rule = _elements if end == "</function>" else _json
    lines = ["start: " + " | ".join(f"call{number}" for number in range(len(named)))]
    for number, (name, schema) in enumerate(zip(names, named.values(), strict=True)):
        arguments, rules = rule(schema, f"call{number}")
        lines += [f"call{number}: {name} {arguments} {_quoted(end)}", *rules]
    return Beginning(begin, Grammar(kind="grammar", text="\n".join([*lines, _TEXT])))


def _json(schema: Mapping[str, Any], call: str) -> tuple[str, list[str]]:
    """What stands for the arguments of a call, JSON of a schema, and its rules."""
    whole = {"type": "object", **schema} if schema else {"type": "object", "maxProperties": 0}
    return f"{call}_0", [f"{call}_0: {_held(whole)}"]


def _elements(schema: Mapping[str, Any], call: str) -> tuple[str, list[str]]:
    """The same where each argument is an element, in the order of the schema."""
    properties, required = properties_of(schema), schema.get("required")
    if properties is None:
        if not schema or schema.get("additionalProperties") is False:
            return "", []
        return f"{call}_0*", [f'{call}_0: "<parameter=" /[^<>\\n]+/ ">\\n" text']  # any arguments
    uses, rules = [], []
    for place, (name, described) in enumerate(properties.items()):
        if _UNNAMEABLE.search(name) or name != name.strip():
            expected = "expected a name without <, >, control characters or space around it"
            raise ConfigError(f"parameters.properties has {shown(name)}; {expected}")
        rules.append(f"{call}_{place}: {_quoted(f'<parameter={name}>' + chr(10))} {_value(described)}")
        must = isinstance(required, list) and name in required
        uses.append(f"{call}_{place}" + ("" if must else "?"))
    return " ".join(uses), rules


def _value(schema: Any) -> str:
    """The value of an argument and what ends it."""
    end = _quoted(_END)
    if options := options_of(schema):
        words = " | ".join(_quoted(o if isinstance(o, str) else json.dumps(o)) for o in options)
        return f"({words}) {end}"
    kinds = kinds_of(schema)
    return "text" if not kinds or "string" in kinds else f"{_held(schema)} {end}"


def _held(schema: Mapping[str, Any]) -> str:
    """JSON of a schema, with no more space than other answers in JSON may have."""
    return f"%json {json.dumps({**schema, 'x-guidance': SPACES})}"


def _quoted(text: str) -> str:
    """A string of Lark, which is one of JSON."""
    return json.dumps(text, ensure_ascii=False)
