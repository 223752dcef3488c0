"""Answers that must be JSON of a schema: 1 if they are, else 0. What they say is not judged (Nemotron 3 Nano report,
section 3.2). A task is a line {"key"?: text, "prompt": text, "schema": object}. Needs the extra `rl` (jsonschema)."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

from orogen.config.checks import ConfigError
from orogen.config.json_file import Record
from orogen.config.rl import EnvironmentConfig
from orogen.posttrain.environments.code import FENCE
from orogen.posttrain.environments.files import lines_of, no_constant
from orogen.posttrain.environments.interface import Example, Said, Turn, asked, over

_TASK = Record({"prompt": str, "schema": dict}, {"key": str})
FIELDS = {
    "name": {"type": "string", "minLength": 1},
    "age": {"type": "integer", "minimum": 0},
    "city": {"type": "string", "minLength": 1},
    "member": {"type": "boolean"},
    "score": {"type": "number"},
    "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    "size": {"enum": ["small", "medium", "large"]},
}
NAMES = ("Ada", "Bo", "Chen", "Dana", "Eli", "Fatima")


class Schema:
    """Raises ConfigError without jsonschema, for a malformed file, and for a schema that is none."""

    def __init__(self, config: EnvironmentConfig) -> None:
        try:
            self._library = importlib.import_module("jsonschema")
        except ImportError as error:
            raise ConfigError(
                f"EnvironmentConfig.kind is 'json_schema'; expected `pip install 'orogen[rl]'` ({error})"
            ) from None
        self._config = config
        self._tasks = None if config.corpus is None else lines_of(Path(config.corpus), _TASK)
        for number, task in enumerate(self._tasks or (), 1):
            try:
                self._validator(task["schema"])
            except self._library.SchemaError as error:
                raise ConfigError(f"{config.corpus}: the schema of task {number} is none: {error.message}") from None

    def __len__(self) -> int:
        return self._config.examples if self._tasks is None else len(self._tasks)

    def example(self, number: int) -> Example:
        """Task `number`."""
        if self._tasks is None:
            return _generated(number, self._config)
        task = self._tasks[number]
        return asked(task.get("key") or str(number), task["prompt"], task["schema"])

    def start(self, example: Example) -> Any:
        """Nothing."""
        return None

    def step(self, example: Example, state: Any, said: Said) -> Turn:
        """1 if the content is one JSON value of the schema, alone or as the only block of code, else 0."""
        text = (said.content or said.text).strip()
        if text.startswith(FENCE) and text.endswith(FENCE) and text.count(FENCE) == 2:
            text = text.strip("`").removeprefix("json")
        try:
            value = json.loads(text, parse_constant=no_constant)
        except (ValueError, RecursionError):
            return over(valid=0.0)
        return over(valid=float(self._validator(example.secret).is_valid(value)))

    def _validator(self, schema: dict[str, Any]) -> Any:
        kind = self._library.validators.validator_for(schema)
        kind.check_schema(schema)
        # References are looked up within the schema alone: nothing is fetched.
        registry = importlib.import_module("referencing").Registry()
        return kind(schema, registry=registry)


def _generated(number: int, config: EnvironmentConfig) -> Example:
    rng = random.Random(f"schema {config.level} {config.seed} {number}")
    chosen = rng.sample(sorted(FIELDS), k=min(config.level + 1, len(FIELDS)))
    schema = {
        "type": "object", "properties": {field: FIELDS[field] for field in chosen}, "required": chosen,
        "additionalProperties": False,
    }  # fmt: skip
    text = f"Describe {rng.choice(NAMES)} as one JSON object of this schema:\n{json.dumps(schema)}"
    return asked(str(number), text, schema)
