"""Which fields of a run's config are read, and the settings that nothing reads.

A setting is a value that differs from its field's default. Whether a file binds the field does not matter: gin's
operative text binds every field of a dataclass, defaults included, and a saved `config.gin` must load again. A binding
equal to the default changes nothing either way.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.kinds import reading
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.readers import READERS
from orogen.config.run import PARTS, RunConfig


class Setting(NamedTuple):
    """A field that nothing reads, with a value other than its default."""

    part: str
    field: str
    value: Any
    default: Any
    otherwise: str

    @property
    def name(self) -> str:
        """The name by which gin binds it."""
        return f"{PARTS[self.part].__name__}.{self.field}"


def layers_read(pattern: str, field: str) -> bool:
    """Whether a layer of the pattern reads the field of ModelConfig; all layers read a field without letters."""
    return bool(set(reading(field) or pattern) & set(pattern))


def plan_read(model: ModelConfig, plan: PlanConfig, field: str) -> bool:
    """Whether the model on the plan reads the field of PlanConfig."""
    run = RunConfig(model=model, plan=plan)
    return all(reader.holds(run) for reader in READERS["plan"] if field in reader.fields.split())


def unread(run: RunConfig) -> list[Setting]:
    """The settings that nothing reads, each with the first of its conditions that does not hold."""
    found: dict[tuple[str, str], Setting] = {}
    for part, readers in READERS.items():
        config = getattr(run, part)
        if config is None:
            continue
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for reader in readers:
            if any(getattr(run, need) is None for need in reader.needs) or reader.holds(run):
                continue
            for field in reader.fields.split():
                value = getattr(config, field)
                if value != defaults[field]:
                    setting = Setting(part, field, value, defaults[field], reader.otherwise)
                    found.setdefault((part, field), setting)
    return list(found.values())


def require_read(run: RunConfig) -> RunConfig:
    """The run itself. Raises ConfigError, in one line, with every setting that nothing reads and why."""
    groups = itertools.groupby(sorted(unread(run), key=lambda s: s.otherwise), key=lambda s: s.otherwise)
    if refusals := [_refusal(list(settings), otherwise) for otherwise, settings in groups]:
        raise ConfigError("; ".join(refusals))
    return run


def _refusal(settings: list[Setting], otherwise: str) -> str:
    values = ", ".join(f"{setting.name} is {setting.value!r}" for setting in settings)
    defaults = ", ".join(repr(setting.default) for setting in settings)
    return f"{values}; expected {defaults}, since nothing reads {'it' if len(settings) == 1 else 'them'}: {otherwise}"


def without_unread(run: RunConfig) -> RunConfig:
    """The run with the default for every field that nothing reads; it behaves the same."""
    while settings := unread(run):  # another field's reader may depend on the changed default
        changed: dict[str, Any] = {}
        for part in {setting.part for setting in settings}:
            defaults = {setting.field: setting.default for setting in settings if setting.part == part}
            changed[part] = dataclasses.replace(getattr(run, part), **defaults)
        run = dataclasses.replace(run, **changed)
    return run


def plain_model(model: ModelConfig) -> ModelConfig:
    """The model with the default for every field that it does not read, so that equal models compare equal."""
    return without_unread(RunConfig(model=model, plan=PlanConfig())).model
