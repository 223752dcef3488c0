"""Tasks of environments in .jsonl files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.json_file import Record, read_object

MOST_BYTES = 2**24  # of a line


def lines_of(file: Path, record: Record, *, one_of: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The tasks of a file. one_of: fields of which each task must have one. Raises ConfigError with file and line."""
    if not file.is_file():
        raise ConfigError(f"EnvironmentConfig.corpus is {str(file)!r}; expected a .jsonl file")
    found = []
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            where = f"{file}:{number}"
            if len(line) > MOST_BYTES:
                raise ConfigError(f"{where} has more than {MOST_BYTES} bytes; expected a shorter line")
            if not line.strip():
                continue
            task = read_object(line, record, where=where)
            if one_of and sum(bool(task.get(field)) for field in one_of) != 1:
                raise ConfigError(f"{where}: expected one of {', '.join(one_of)}")
            found.append(task)
    if not found:
        raise ConfigError(f"{file} has no task; expected some")
    return found


def no_constant(name: str) -> Any:
    """For `json.loads`: raises ValueError for NaN and infinities, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not JSON")
