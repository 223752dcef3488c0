"""The fields of every config, with the meaning that each declares as `Annotated[type, "meaning"]`."""

import dataclasses
import typing
from typing import Any

from orogen.config.checks import field_types, type_name
from orogen.config.cluster import ClusterConfig
from orogen.config.curate import CURATION
from orogen.config.data import SourceConfig
from orogen.config.phases import PhaseConfig
from orogen.config.prune import PruneConfig
from orogen.config.quantize import QuantizeConfig
from orogen.config.rl import EnvironmentConfig
from orogen.config.run import PARTS
from orogen.config.search import SearchConfig
from orogen.config.sweep import SweepConfig
from orogen.config.upcycle import UpcycleConfig

# The parts of a run, what their fields hold, and what other tasks read.
OWN = (
    SourceConfig, PhaseConfig, EnvironmentConfig, ClusterConfig, SweepConfig, UpcycleConfig, PruneConfig,
    QuantizeConfig, SearchConfig,
)  # fmt: skip
KINDS = (*PARTS.values(), *OWN, *CURATION)


def describe_fields() -> dict[str, list[dict[str, Any]]]:
    """By class, one dict per field: name, type, default (absent if the field is required) and meaning."""
    return {kind.__name__: _fields(kind) for kind in KINDS}


def _fields(kind: type) -> list[dict[str, Any]]:
    types, annotated = field_types(kind), typing.get_type_hints(kind, include_extras=True)
    described = []
    for field in dataclasses.fields(kind):
        (meaning,) = annotated[field.name].__metadata__
        default = {} if field.default is dataclasses.MISSING else {"default": field.default}
        # `float | None` says no more than the default None does.
        shown = type_name(types[field.name]).removesuffix(" | None")
        described.append({"name": field.name, "type": shown, **default, "meaning": meaning})
    return described


def field_lines(classes: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The name of each class, then its fields as a table."""
    lines = []
    for name, fields in classes.items():
        cells = [(f["name"], f["type"], repr(f["default"]) if "default" in f else "required") for f in fields]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", name]
        for row, field in zip(cells, fields, strict=True):
            padded = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {padded}  {field['meaning']}")
    return lines[1:]
