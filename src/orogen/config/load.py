"""Reads gin files into a RunConfig and refuses what nothing read; the only file that imports gin."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import gin
from gin.config_parser import ConfigParser, BindingStatement  # isort: skip

from orogen.config.checks import ConfigError
from orogen.config.run import PARTS, RunConfig

for _part in PARTS.values():
    gin.register(_part)


def load(files: Sequence[str | Path], bindings: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """The RunConfig of `files` with `bindings` on top, and its operative text, which loads to an equal config.

    A part is built if any binding names it, or if none of its fields is required. Includes are looked up beside the
    file and in its parent folder. Raises ConfigError in one line on anything gin refuses (unknown class, field or
    file), on a field's own refusal, on a key bound twice in one file, and on bindings that nothing read: gin itself
    is silent on misspelt macros, unused scopes and duplicate keys.
    """
    gin.clear_config()
    for file in map(Path, files):
        if not file.is_file():
            raise ConfigError(f"gin file {str(file)!r} does not exist")
        _refuse_duplicates(file)
        for folder in (file.resolve().parent, file.resolve().parent.parent):
            gin.add_config_file_search_path(str(folder))
    logging.disable(logging.ERROR)  # gin logs each folder in which an include is not
    try:
        gin.parse_config_files_and_bindings([str(f) for f in files], list(bindings), skip_unknown=False)
        bound = _keys(gin.config_str())
        parts = {name: gin.get_configurable(kind)() for name, kind in PARTS.items() if _wanted(kind, bound)}
    except ConfigError as error:
        raise ConfigError(_first_line(error)) from None
    except (ValueError, TypeError, SyntaxError, OSError, RuntimeError, KeyError) as error:
        raise ConfigError(f"gin: {_first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)
    text = gin.operative_config_str()
    read = _keys(text)
    dead = sorted(key for key in bound if key not in read and not any(r.endswith("/" + key) for r in read))
    if dead:
        raise ConfigError(f"bindings that nothing read: {', '.join(dead)}; expected fields of {', '.join(_classes())}")
    return RunConfig(**{name: parts.get(name) for name in PARTS}).check(), text


def _classes() -> list[str]:
    return [kind.__name__ for kind in PARTS.values()]


def _wanted(kind: type, bound: Iterable[str]) -> bool:
    required = any(f.default is dataclasses.MISSING for f in dataclasses.fields(kind))
    return not required or any(key.split("/")[-1].split(".")[-2:-1] == [kind.__name__] for key in bound)


def _keys(text: str) -> set[str]:
    """The names left of `=` at the start of a line."""
    return set(re.findall(r"^([^\s#=]+)\s*=", text, flags=re.MULTILINE))


def _refuse_duplicates(file: Path) -> None:
    with file.open() as stream:
        try:
            statements = list(ConfigParser(stream, _Delegate()))
        except SyntaxError as error:
            raise ConfigError(f"gin: {_first_line(error)}") from None
    seen: set[str] = set()
    for statement in statements:
        if isinstance(statement, BindingStatement):
            key = f"{statement.scope}/{statement.selector}.{statement.arg_name}".strip("/")
            if key in seen:
                raise ConfigError(f"{file}, line {statement.location.line_num}: {key} is bound twice; expected once")
            seen.add(key)


class _Delegate:
    """Lets gin's parser read a file without resolving what its values refer to."""

    def configurable_reference(self, name: str, evaluate: bool) -> str:
        return name

    def macro(self, name: str) -> str:
        return name


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
