"""Reads the fields of a Hugging Face config.json and refuses bad ones; and the rotary fields, which families share."""

import math
from typing import Any, NoReturn

from orogen.config.checks import ABSENT, ConfigError, shown
from orogen.config.json_file import Record, check_form
from orogen.config.model import ModelConfig
from orogen.convert.defaults import ALIASES, DEFAULTS, NULLS
from orogen.convert.kinds import kind_of

ACTIVATIONS = {
    "relu2": "relu2",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATION_NAMES = {"relu2": "relu2", "relu": "relu", "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
UNBOUNDED = 1e300  # some files hold the largest float in place of infinity


class Fields:
    """A config.json, and the names of the fields that were read. Refusals name the field and its value."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.read: set[str] = {"model_type"}
        self.family: Any = values.get("model_type")
        if not isinstance(self.family, str) or self.family not in DEFAULTS:
            self.refuse("model_type", self.family, "one of " + ", ".join(DEFAULTS))
        self._defaults, self._nulls = DEFAULTS[self.family], NULLS.get(self.family, {})
        self._aliases = ALIASES.get(self.family, {})

    def get(self, name: str) -> Any:
        """The field under this name or one of its aliases; if the file leaves it out, the family's default.

        A null means what it means to the family's class, and is refused if that is an error there.
        """
        names = (name, *self._aliases.get(name, ()))
        self.read |= {*names}
        found = {key: self.values[key] for key in names if self.values.get(key) is not None}
        if not found:
            default = self._defaults[name]
            if not any(key in self.values for key in names):
                return default
            if name not in self._nulls and default is not None:
                self.refuse(name, None, "a value")
            return self._nulls.get(name)
        first = next(iter(found))
        for key, value in found.items():
            _check_kind(name, key, value, self._defaults[name])
            if value != found[first]:
                self.refuse(key, value, f"{shown(found[first])}, as {first} is")
        return found[first]

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses the field if it is present and not one of `allowed`."""
        self.read.add(name)
        value = self.values.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, value, " or ".join(map(repr, allowed)) or "nothing: this is not implemented")

    def refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        """Raises ConfigError about the field."""
        raise ConfigError(f"config.json: {name} is {shown(value)}; expected {expected}")

    def activation(self, name: str) -> str:
        """The activation's name in ModelConfig."""
        value = self.get(name)
        if value not in ACTIVATIONS:
            self.refuse(name, value, " or ".join(map(repr, ACTIVATIONS)))
        return ACTIVATIONS[value]

    def limits(self, name: str) -> dict[str, float]:
        """A range of time steps as time_step_min and time_step_max, None for an end without a bound."""
        value = self.get(name)
        numbers = [number(v) for v in value] if isinstance(value, list | tuple) else []
        if len(numbers) != 2 or any(v is None for v in numbers):
            self.refuse(name, value, "two numbers, the second may be infinite")
        low, high = numbers
        return {"time_step_min": low if low > 0 else ABSENT, "time_step_max": high if high < UNBOUNDED else ABSENT}


def _check_kind(name: str, key: str, value: Any, default: Any) -> None:
    """Raises ConfigError unless `value`, which the file has under the name `key`, fits the form of the field `name`."""
    if (kind := kind_of(name, default)) is not None:
        try:
            check_form({key: value}, Record({key: kind}), where="config.json")
        except ConfigError as error:
            raise ConfigError(f"{error}: expected fields of the types that transformers writes") from None


def number(value: Any) -> Any:
    """A number of a config.json, where infinity may be written as {"__float__": "Infinity"}; None for anything else."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(value["__float__"], ABSENT)
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return ABSENT
    return value


def rotary(fields: Fields, *, partly: bool = False) -> dict[str, Any]:
    """ModelConfig's rotary fields, from rope_parameters or from the older rope_theta and rope_scaling.

    partly: whether the family's class can rotate a part of each head. Other classes ignore partial_rotary_factor,
    except in YaRN's frequencies, which are then too few for their heads.
    """
    whole, stated = fields.get("partial_rotary_factor"), _stated(fields)
    kind = stated.pop("rope_type", stated.pop("type", "default"))
    stated.pop("type", None)
    older = fields.get("rope_theta")
    base: Any = stated.pop("rope_theta", older)
    share: Any = stated.pop("partial_rotary_factor", None) or whole or 1.0
    if base is None:
        fields.refuse("rope_theta", None, "a number")
    if kind not in ("default", "yarn"):
        fields.refuse("rope_type", kind, "'default' or 'yarn'")
    if kind == "yarn" and share != 1 and not partly:
        fields.refuse("partial_rotary_factor", share, f"1.0: {fields.family} cannot have it with YaRN")
    found: dict[str, Any] = {"rope_theta": float(base), "partial_rotary_factor": float(share) if partly else 1.0}
    return found | (_yarn(fields, stated) if kind == "yarn" else {})


def _stated(fields: Fields) -> dict[str, Any]:
    """rope_scaling, which has precedence in transformers, or rope_parameters."""
    stated = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    fields.get("rope_parameters")
    return dict(stated)


def _yarn(fields: Fields, stated: dict[str, Any]) -> dict[str, Any]:
    longest, before = fields.get("max_position_embeddings"), stated.pop("original_max_position_embeddings", None)
    before = fields.get("original_max_position_embeddings") or before or longest
    if "factor" not in stated:
        fields.refuse("rope_parameters.factor", None, "a number: rope_type is 'yarn'")
    factor = stated.pop("factor") or longest / before
    found: dict[str, Any] = {"yarn_factor": float(factor), "yarn_original_positions": before}
    names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    given = {name: stated.pop(name) for name in names if stated.get(name) is not None}
    found |= {f"yarn_{name}": v if name == "truncate" else float(v) for name, v in given.items()}
    left = {name: value for name, value in stated.items() if value is not None}
    if left:
        fields.refuse(f"rope_parameters.{next(iter(left))}", left[next(iter(left))], "none: it is not implemented")
    return found


def rotary_fields(config: ModelConfig, *, partly: bool = False) -> dict[str, Any]:
    """The inverse of `rotary`: rope_parameters, as transformers 5 writes it."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn_factor is not None:
        found |= {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.yarn_original_positions,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "truncate": config.yarn_truncate,
        }
        scales = {"mscale": config.yarn_mscale, "mscale_all_dim": config.yarn_mscale_all_dim}
        found |= {name: value for name, value in scales.items() if value is not None}
    if partly:
        found["partial_rotary_factor"] = config.partial_rotary_factor
    return {"rope_parameters": found}
