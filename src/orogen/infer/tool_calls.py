"""Calls of tools in a model's text.

Two forms: Nemotron 3's, `<function=NAME>` with `<parameter=ARG>` inside, as Qwen 3 Coder writes it, whose values are
plain text typed by the tool's schema; and JSON, one object or a list of them with `name` and `arguments`, as Nemotron
Nano 2 and Hermes write it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# What a call stands between, by what opens it.
CLOSED_BY = {"<tool_call>": "</tool_call>", "<TOOLCALL>": "</TOOLCALL>"}
_FUNCTION, _END = "<function=", "</function>"
_DEFINITIONS = ("$defs", "definitions")
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class Call(NamedTuple):
    """A call: the tool's name, and its arguments in order."""

    name: str
    arguments: dict[str, Any]


class BrokenError(ValueError):
    """A text that is no call of a tool that there is."""


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By the name of each tool, the schemas of its parameters."""
    named = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    return {name: properties_of(parameters) or {} for name, parameters in named.items()}


def properties_of(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema of each property, with the definitions to which it refers; None if no properties are described."""
    properties = parameters.get("properties")
    if not isinstance(properties, dict):
        return None
    shared = {key: parameters[key] for key in _DEFINITIONS if isinstance(parameters.get(key), dict)}
    refers = lambda schema: isinstance(schema, dict) and '"$ref"' in json.dumps(schema)  # noqa: E731
    return {name: {**schema, **shared} if refers(schema) else schema for name, schema in properties.items()}


def read_calls(block: str, tools: Mapping[str, Mapping[str, Any]]) -> list[Call]:
    """The calls of a block, what stands between a pair of CLOSED_BY. tools: as `schemas_of` gives them.

    Raises BrokenError.
    """
    text = block.strip()
    calls = list(_json_calls(text)) if text[:1] in ("{", "[") else [_function(text, tools)]
    for call in calls:
        if call.name not in tools:
            raise BrokenError(f"no tool {call.name!r}")
    return calls


def _json_calls(text: str) -> Iterator[Call]:
    try:
        found = _json(text)
    except (ValueError, RecursionError) as error:
        raise BrokenError(str(error)) from None
    for one in found if isinstance(found, list) else [found]:
        name, arguments = (one.get("name"), one.get("arguments", {})) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BrokenError("an object without a name or arguments")
        yield Call(name, arguments)


def _function(text: str, tools: Mapping[str, Mapping[str, Any]]) -> Call:
    """One call in `<function=…>`. A value ends at the first `</parameter>` that a parameter or the end follows."""
    name, closed, rest = text.removeprefix(_FUNCTION).partition(">")
    name = name.strip()
    if not text.startswith(_FUNCTION) or not closed or not rest.rstrip().endswith(_END):
        raise BrokenError("no function")
    rest = rest.rstrip().removesuffix(_END)
    schemas, arguments = tools.get(name, {}), {}
    while rest.strip():
        if not rest.lstrip().startswith(_PARAMETER):
            raise BrokenError("text beside the parameters")
        key, closed, rest = rest.lstrip().removeprefix(_PARAMETER).partition(">")
        if not closed:
            raise BrokenError("a parameter without an end")
        value, rest = _value(rest)
        arguments[key.strip()] = typed(value, schemas.get(key.strip()))
    return Call(name, arguments)


def _value(text: str) -> tuple[str, str]:
    """A parameter's value, without the line ends around it, and what follows."""
    end = text.find(_PARAMETER_END)
    while end >= 0:
        after = end + len(_PARAMETER_END)
        # Looks at what follows without copying it: a value may spell its own end thousands of times.
        place = next((i for i in range(after, len(text)) if not text[i].isspace()), len(text))
        if place == len(text) or text.startswith(_PARAMETER, place):
            return text[:end].removeprefix("\n").removesuffix("\n"), text[after:]
        end = text.find(_PARAMETER_END, after)
    raise BrokenError("a parameter without an end")


def typed(text: str, schema: Any) -> Any:
    """A value as its JSON schema types it; the text itself where that says `string`, nothing, or what it is not."""
    kinds = kinds_of(schema)
    if not kinds or kinds == {"string"}:
        return text
    word = text.strip()
    if "boolean" in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if "null" in kinds and word.lower() in ("null", "none"):
        return None
    try:
        value = _json(word)
    except (ValueError, RecursionError):
        return text
    return value if _kind(value) & kinds else text


def kinds_of(schema: Any) -> set[str]:
    """The types that a schema allows, through `anyOf`, `oneOf`, `allOf` and references to its definitions; those of its
    `enum` or `const` where it says nothing else."""
    return _kinds(schema, schema, set())


def _kinds(schema: Any, root: Any, seen: set[str]) -> set[str]:
    """seen: references that have been followed, each once: definitions may go in circles."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type")
    kinds = {k for k in (kind if isinstance(kind, list) else [kind]) if isinstance(k, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for option in schema[key] if isinstance(schema.get(key), list) else []:
            kinds |= _kinds(option, root, seen)
    if not kinds and isinstance(reference := schema.get("$ref"), str) and reference not in seen:
        seen.add(reference)
        kinds = _kinds(_definition(root, reference), root, seen)
    return kinds or {kind for option in _options(schema) for kind in _kind(option)}


def options_of(schema: Any) -> list[Any]:
    """The values of a schema's `enum` or `const`, or of the definition to which it refers; none if it has neither."""
    if isinstance(schema, dict) and isinstance(reference := schema.get("$ref"), str):
        return _options(_definition(schema, reference))
    return _options(schema)


def _options(schema: Any) -> list[Any]:
    if not isinstance(schema, dict):
        return []
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    return options if isinstance(options, list) else []


def _definition(root: Any, reference: str) -> Any:
    """What a reference names among the definitions of a schema; None if there is no such one."""
    start, key, name = (*reference.split("/", 2), "", "")[:3]
    found = root.get(key) if start == "#" and key in _DEFINITIONS else None
    return found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None


def _kind(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    names = {str: "string", list: "array", dict: "object", type(None): "null"}
    return {names[type(value)]}


def _json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for numbers that are not finite: who gets a call could not read
    them."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number
