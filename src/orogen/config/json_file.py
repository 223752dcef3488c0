"""JSON from outside: parsed within limits, and its types checked against a description before anything reads it.

A description is a type (str, bool, int, float, None, dict, list), a `Whole`, a `Number`, a `ListOf`, a `MapOf`, a
`Record`, or a tuple of alternatives. An int fits float; a bool fits neither.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError, is_unicode, shown

MAX_BYTES = 10**8  # of a file: the largest released tokenizer.json has 35 MB
MAX_DEPTH = 64  # of nested lists and objects
MAX_DIGITS = 100  # of an integer, so that a float holds it; transformers writes int(1e30) for "no limit"

# An unterminated string matches too, and nothing backtracks: otherwise a long one would take quadratic time.
_BRACKETS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MISSING = object()
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


class Whole(NamedTuple):
    """A whole number from `low` to `high`."""

    low: int = 0
    high: int = 2**63 - 1


class Number(NamedTuple):
    """A finite number."""


class ListOf(NamedTuple):
    """A list whose items all fit `item`; `length`: the number of items, None for any."""

    item: Any
    length: int | None = None


class MapOf(NamedTuple):
    """An object whose values all fit `value`."""

    value: Any


class Record(NamedTuple):
    """An object with the fields `required`; fields `optional` must fit if present. It may have other fields."""

    required: Mapping[str, Any]
    optional: Mapping[str, Any] = {}


_CONTAINERS = {ListOf: list, MapOf: dict, Record: dict}


def parse_json(data: bytes, *, where: str) -> Any:
    """The value of a JSON text. Infinity and NaN are numbers, as Python's own `json` writes them.

    Raises ConfigError in one line if the text is not JSON in UTF-8, nests deeper than MAX_DEPTH, has an integer of more
    than MAX_DIGITS digits, or an object that gives one name two different values.
    """
    if data.startswith(_BYTE_ORDER_MARKS):
        raise ConfigError(f"{where}: it begins with a byte order mark; expected JSON in UTF-8 without one")
    _check_depth(data, where)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} is not UTF-8; expected JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{where}: {error.msg} at {place}; expected JSON") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_json(file: Path, form: Any = dict) -> dict[str, Any]:
    """The JSON object of a file, which fits `form`; its strings are valid Unicode.

    Raises ConfigError if the file holds no such object or more than MAX_BYTES, OSError if it cannot be read.
    """
    if (size := file.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{file} has {size} bytes; expected at most {MAX_BYTES}")
    return read_object(file.read_bytes(), form, where=str(file))


def read_object(data: bytes, form: Any = dict, *, where: str) -> dict[str, Any]:
    """The JSON object of a text, which fits `form`; its strings are valid Unicode. Raises ConfigError."""
    value = parse_json(data, where=where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds {type(value).__name__}; expected a JSON object")
    if _SURROGATE.search(data) and (text := _lone_surrogate(value)) is not None:
        raise ConfigError(f"{where}: {shown(text)} has a lone surrogate; expected valid Unicode")
    check_form(value, form, where=where)
    return value


def check_form(value: Any, form: Any, *, where: str) -> None:
    """Raises ConfigError, naming the place in `value`, its value and what was expected, unless `value` fits `form`."""
    for name, found, expected in _misfits(value, form, ""):
        if found is _MISSING:
            raise ConfigError(f"{where}: {name} is missing; expected {described(expected)}")
        raise ConfigError(f"{where}: {name or 'it'} is {shown(found)}; expected {described(expected)}")


def fits(value: Any, form: Any) -> bool:
    """Whether `value` fits `form`."""
    return next(_misfits(value, form, ""), None) is None


def _misfits(value: Any, form: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, value, description) of everything in `value`, called `name`, that does not fit."""
    if isinstance(form, ListOf) and isinstance(value, list) and form.length in (None, len(value)):
        for number, item in enumerate(value):
            yield from _misfits(item, form.item, f"{name}[{number}]")
    elif isinstance(form, MapOf) and isinstance(value, dict):
        for key, item in value.items():
            yield from _misfits(item, form.value, f"{name}.{key}" if name else key)
    elif isinstance(form, Record) and isinstance(value, dict):
        for key, inner in {**form.required, **form.optional}.items():
            if key in value or key in form.required:
                yield from _misfits(value.get(key, _MISSING), inner, f"{name}.{key}" if name else key)
    elif type(form) is tuple and form[1:] == (None,) and isinstance(value, _CONTAINERS.get(type(form[0]), ())):
        yield from _misfits(value, form[0], name)  # which names the place inside
    elif not _is_one(value, form):
        yield name, value, form


def _is_one(value: Any, form: Any) -> bool:
    if isinstance(form, ListOf | MapOf | Record) or value is _MISSING:
        return False
    if isinstance(form, Whole):
        return _is_one(value, int) and form.low <= value <= form.high
    if isinstance(form, Number):
        return _is_one(value, float) and math.isfinite(value)
    if isinstance(form, tuple):
        return any(fits(value, option) for option in form)
    if form is None:
        return value is None
    if form in (int, float):
        return isinstance(value, int if form is int else int | float) and not isinstance(value, bool)
    return isinstance(value, form)


def described(form: Any) -> str:
    """`form` in words."""
    if isinstance(form, Whole):
        return f"a whole number from {form.low} to {form.high}"
    if isinstance(form, Number):
        return "a finite number"
    if isinstance(form, ListOf):
        return f"a list of {'' if form.length is None else f'{form.length}, each '}{described(form.item)}"
    if isinstance(form, MapOf):
        return f"an object whose values are {described(form.value)}"
    if isinstance(form, Record):
        return f"an object with {', '.join(form.required) or 'named fields'}"
    if isinstance(form, tuple):
        return " or ".join(map(described, form))
    words = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}
    return "null" if form is None else words.get(form, f"a {form.__name__}")


def _check_depth(data: bytes, where: str) -> None:
    """json recurses as deeply as the text nests, and raises RecursionError at a depth that depends on the caller."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _BRACKETS.finditer(data):
        first = data[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: it nests more than {MAX_DEPTH} deep; expected less")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if seen.setdefault(name, value) != value:
                raise ConfigError(f"{shown(name)} occurs twice with different values; expected once")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ConfigError(f"an integer has {len(digits)} digits; expected at most {MAX_DIGITS}")
    return int(digits)


def _lone_surrogate(value: Any) -> str | None:
    """A string in `value` that UTF-8 cannot encode, None without one."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and not is_unicode(item):
            return item
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            left += item
    return None
