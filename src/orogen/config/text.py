"""Gin text that loads to a given config."""

import dataclasses
from typing import Any

from orogen.config.lora import base_of
from orogen.config.model import ModelConfig
from orogen.config.run import PARTS, RunConfig


def model_bindings(config: ModelConfig) -> list[str]:
    """`ModelConfig.field = value` for every field; adapters are not among them."""
    return [f"ModelConfig.{f.name} = {getattr(config, f.name)!r}" for f in dataclasses.fields(ModelConfig)]


def model_text(config: ModelConfig) -> str:
    """The text of a gin file that loads to an equal config."""
    return "\n".join(model_bindings(config)) + "\n"


def parts_of(config: RunConfig) -> dict[str, Any]:
    """The parts of a run by name, as gin files bind them: adapters are a part of their own, not of the model."""
    parts = {name: getattr(config, name) for name in PARTS}
    return parts | {"model": None if config.model is None else base_of(config.model)}


def run_text(config: RunConfig) -> str:
    """The text of a gin file that loads to an equal config."""
    lines: list[str] = []
    for part in parts_of(config).values():
        for field in dataclasses.fields(part) if part is not None else ():
            value, name = getattr(part, field.name), f"{type(part).__name__}.{field.name}"
            if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
                scopes = [f"{field.name}_{number}" for number in range(len(value))]
                lines.append(f"{name} = [{', '.join(f'@{s}/{type(value[0]).__name__}()' for s in scopes)}]")
                lines += [line for scope, one in zip(scopes, value, strict=True) for line in _scoped(scope, one)]
            elif dataclasses.is_dataclass(value):
                lines += [f"{name} = @{field.name}/{type(value).__name__}()", *_scoped(field.name, value)]
            else:
                lines.append(f"{name} = {value!r}")
    return "\n".join(lines) + "\n"


def _scoped(scope: str, config: Any) -> list[str]:
    return [
        f"{scope}/{type(config).__name__}.{f.name} = {getattr(config, f.name)!r}" for f in dataclasses.fields(config)
    ]
