"""The form that an answer must have: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_*`."""

import json
import re
from typing import Any

from orogen.config.checks import ConfigError, shown
from orogen.config.json_file import ListOf, Record
from orogen.infer.request import Grammar
from orogen.infer.serve.errors import bad

_FORMAT = Record({"type": str}, {"json_schema": (Record({}, {"schema": (dict, None)}), None)})
_KINDS = {
    "json": (dict, str, None),
    "regex": (str, None),
    "choice": (ListOf(str), None),
    "grammar": (str, None),
    "json_object": (bool, None),
}
FIELDS = {
    **{f"guided_{name}": form for name, form in _KINDS.items()},
    "structured_outputs": (Record({}, _KINDS), None),
    "response_format": (_FORMAT, None),
}
_ANY_OBJECT = {"type": "object"}


def grammar(body: dict[str, Any]) -> Grammar | None:
    """What an answer must match. Raises HttpError for more than one form, and for kinds that are not offered."""
    outputs = body.get("structured_outputs", {})
    if other := sorted(key for key in outputs.keys() - _KINDS if outputs[key] not in (None, False)):
        raise bad(f"structured_outputs is of {', '.join(other)}; expected one of {', '.join(_KINDS)}")
    named = {f"guided_{kind}": (kind, body.get(f"guided_{kind}")) for kind in _KINDS}
    named |= {f"structured_outputs.{kind}": (kind, outputs.get(kind)) for kind in _KINDS}
    given = [(name, kind, value) for name, (kind, value) in named.items() if value not in (None, False)]
    if (schema := _schema(body.get("response_format", {"type": "text"}))) is not None:
        given.append(("response_format", "json", schema))
    if len(given) > 1:
        raise bad(f"{' and '.join(name for name, *_ in given)}; expected one of them")
    return _made(*given[0]) if given else None


def _made(name: str, kind: str, value: Any) -> Grammar:
    if kind == "choice":
        if not value or not all(value):
            raise bad(f"{name} is {shown(value)}; expected at least one text, none empty")
        kind, value = "regex", "|".join(map(re.escape, value))
    if kind == "json_object":
        value = _ANY_OBJECT
    kinds = {"json": "json_schema", "json_object": "json_schema"}
    try:
        return Grammar(kind=kinds.get(kind, kind), text=value if isinstance(value, str) else json.dumps(value))
    except ConfigError as error:
        raise bad(error) from None


def _schema(form: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of OpenAI's form of an answer."""
    if form["type"] == "json_schema":
        if not form.get("json_schema"):
            raise bad("response_format.json_schema is missing; expected an object with a schema")
        if (schema := form["json_schema"].get("schema")) is None:
            raise bad("response_format.json_schema.schema is missing; expected a JSON schema")
        return schema
    if form["type"] not in ("text", "json_object"):
        raise bad(f"response_format.type is {shown(form['type'])}; expected text, json_object or json_schema")
    return _ANY_OBJECT if form["type"] == "json_object" else None
