"""Checks that configs make when they are built: types, ranges and names, each with a one-line message."""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

# The default of a field that only some configs need. Its type is Any, so that fields can be declared without `| None`:
# code that reads such a field runs only after a check that it is set.
ABSENT: Any = None


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the field, its value and what was expected."""


SHOWN = 1000  # characters of a value in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = SHOWN
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 50
_SHORT.maxlevel = 4


def shown(value: Any) -> str:
    """`value` as a message shows it: its repr, shortened if it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}..."


def require(holds: bool, config: Any, field: str, expected: str) -> None:
    """Raises ConfigError about `config.field` unless `holds`."""
    if not holds:
        raise ConfigError(f"{type(config).__name__}.{field} is {shown(getattr(config, field))}; expected {expected}")


def require_choice(config: Any, field: str, choices: Iterable[str]) -> None:
    """Raises ConfigError unless `config.field` is one of `choices`."""
    choices = tuple(choices)
    require(getattr(config, field) in choices, config, field, "one of " + ", ".join(choices))


def require_positive(config: Any, *fields: str) -> None:
    """Raises ConfigError unless each of `fields` is None or finite and above zero."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or 0 < value < math.inf, config, field, "a number above 0")


def require_not_negative(config: Any, *fields: str) -> None:
    """Raises ConfigError unless each of `fields` is None or finite and not below zero."""
    for field in fields:
        value = getattr(config, field)
        require(value is None or 0 <= value < math.inf, config, field, "0 or more")


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold `text`: it cannot hold a lone surrogate, into which Python turns undecodable bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_types(config: Any) -> None:
    """Raises ConfigError unless every field of the dataclass `config` has the type it declares.

    An int passes for a float, a bool never passes for a number. gin itself would accept '1e-3' for a float silently.
    """
    hints = field_types(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        absent = value is None and field.default is None
        if not absent and not _matches(value, hint):
            require(False, config, field.name, f"a value of type {type_name(hint)}")
        # The config is saved in UTF-8.
        require(not isinstance(value, str) or is_unicode(value), config, field.name, "valid Unicode")


@functools.cache  # a server checks every request: reading the hints takes longer than all the rest of it
def field_types(kind: type) -> Mapping[str, Any]:
    """The type that each field of the dataclass declares, without the meaning that `Annotated` adds."""
    return types.MappingProxyType(typing.get_type_hints(kind))


def type_name(hint: Any) -> str:
    """A type as it is written in source code."""
    return str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        *kinds, last = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            return False
        if last is ...:
            if set(map(type, value)) <= {kinds[0]}:  # a prompt has thousands of ids; checking each takes milliseconds
                return True
            return all(_matches(v, kinds[0]) for v in value)
        return len(value) == len(kinds) + 1 and all(map(_matches, value, (*kinds, last)))
    if origin is dict:
        keys, values = typing.get_args(hint)
        return isinstance(value, dict) and all(_matches(k, keys) and _matches(v, values) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
