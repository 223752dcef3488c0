"""The fields of a Hugging Face config.json: read with their refusals, and rotary positions, which several share."""

import math
from typing import Any

from orogen.config.checks import ABSENT, ConfigError, shown
from orogen.config.json_file import Record, check_form
from orogen.config.model import ModelConfig
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
UNBOUNDED = 1e300  # some files hold the largest float in the place of infinity
REQUIRED = object()


class Fields:
    """A config.json, and which of its fields were read. Refusals name the field and its value."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.read: set[str] = set()

    def get(self, name: str, default: Any = REQUIRED, *, old: tuple[str, ...] = ()) -> Any:
        """The field, or one of its `old` names; `default` where it is missing or null."""
        self.read |= {name, *old}
        found = {key: self.values[key] for key in (name, *old) if self.values.get(key) is not None}
        first = next(iter(found), None)
        if first is None:
            if default is REQUIRED:
                raise ConfigError(f"config.json: {name} is missing; expected a value")
            return default
        for key, value in found.items():
            _check_kind(key, value, default)
            if value != found[first]:
                self.refuse(key, value, f"{shown(found[first])}, as {first} is")
        return found[first]

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses the field where it is present and not one of `allowed`."""
        self.read.add(name)
        value = self.values.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, value, " or ".join(map(repr, allowed)) or "nothing: this is not implemented")

    def refuse(self, name: str, value: Any, expected: str) -> None:
        """Raises ConfigError about the field."""
        raise ConfigError(f"config.json: {name} is {shown(value)}; expected {expected}")

    def activation(self, name: str, default: str) -> str:
        """An activation under our name."""
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            self.refuse(name, value, " or ".join(map(repr, ACTIVATIONS)))
        return ACTIVATIONS[value]

    def limits(self, name: str, *, old: tuple[str, ...] = ()) -> dict[str, float]:
        """A range of time steps as time_step_min and time_step_max, None where it bounds nothing."""
        value = self.get(name, (0.0, math.inf), old=old)
        numbers = [number(v) for v in value] if isinstance(value, list | tuple) else []
        if len(numbers) != 2 or any(v is None for v in numbers):
            self.refuse(name, value, "two numbers, the second may be infinite")
        low, high = numbers
        return {"time_step_min": low if low > 0 else ABSENT, "time_step_max": high if high < UNBOUNDED else ABSENT}


def _check_kind(name: str, value: Any, default: Any) -> None:
    if (kind := kind_of(name, default)) is not None:
        try:
            check_form({name: value}, Record({name: kind}), where="config.json")
        except ConfigError as error:
            raise ConfigError(f"{error}: expected fields of the types that transformers writes") from None


def number(value: Any) -> float:
    """A number of a config.json, where infinity may be written as {"__float__": "Infinity"}; None for anything else."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        value = {"Infinity": math.inf, "-Infinity": -math.inf}.get(value["__float__"])
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return value if numeric and not math.isnan(value) else ABSENT


def rotary(fields: Fields, *, theta: float, partial: float = 1.0) -> dict[str, Any]:
    """ModelConfig's fields of rotary positions: of rope_parameters, or of the older rope_theta and rope_scaling."""
    older: dict[str, Any] = {}
    for name in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        older[name] = fields.get(name, None)
    stated = dict(fields.get("rope_parameters", None) or older["rope_scaling"] or {})
    kind = stated.pop("rope_type", stated.pop("type", "default"))
    stated.pop("type", None)
    base = stated.pop("rope_theta", older["rope_theta"]) or theta
    share = stated.pop("partial_rotary_factor", older["partial_rotary_factor"]) or partial
    found: dict[str, Any] = {"rope_theta": float(base), "partial_rotary_factor": float(share)}
    if kind not in ("default", "yarn"):
        fields.refuse("rope_type", kind, "'default' or 'yarn'")
    if kind == "yarn":
        found["yarn_factor"] = float(stated.pop("factor", 1.0))
        longest = fields.get("max_position_embeddings", None)
        found["yarn_original_positions"] = stated.pop("original_max_position_embeddings", None) or longest
        names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        given = {name: stated.pop(name) for name in names if stated.get(name) is not None}
        found |= {f"yarn_{name}": v if name == "truncate" else float(v) for name, v in given.items()}
    left = {name: value for name, value in stated.items() if value is not None}
    if kind == "yarn" and left:
        fields.refuse(f"rope_parameters.{next(iter(left))}", left[next(iter(left))], "none: it is not implemented")
    return found


def rotary_fields(config: ModelConfig, *, partial: float = 1.0) -> dict[str, Any]:
    """The inverse: rope_parameters, as transformers 5 writes it."""
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
    if config.partial_rotary_factor != 1.0 or partial != 1.0:
        found["partial_rotary_factor"] = config.partial_rotary_factor
    return {"rope_parameters": found}
