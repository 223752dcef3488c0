"""The meanings that config fields declare, and how `orogen plan --fields` prints them."""

import dataclasses
import json
import re

import pytest
from tests.config.test_refusals import GOOD as OF_RUNS

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.curate import CURATION, ClassifyConfig, CurateConfig, DecontaminateConfig
from orogen.config.elastic import ElasticConfig
from orogen.config.fields import KINDS
from orogen.config.lora import LoraConfig
from orogen.config.prune import PruneConfig

GOOD = {kind: {} for kind in CURATION} | {
    CurateConfig: {"sources": (("a", "b"),)},
    ClassifyConfig: {"good": ("a",), "bad": ("b",)},
    DecontaminateConfig: {"evaluation": ("a",)},
    PruneConfig: {"remove_layers": (1,)},
    LoraConfig: {"rank": 2},
    ElasticConfig: {"budgets": (0.5, 1.0), "hidden_size": (8,)},
    **OF_RUNS,
}
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]


def printed(capsys, *options: str) -> str:
    assert main(["plan", "--fields", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_every_field_has_one_line(capsys):
    lines = printed(capsys).splitlines()
    starts = [line for line in lines if line and not line.startswith(" ")]
    assert starts == [kind.__name__ for kind in KINDS]
    found, kind = [], ""
    for line in lines:
        if line.startswith("  "):
            name, rest = line.split(maxsplit=1)
            found.append((kind, name))
            assert len(rest.split(maxsplit=2)) == 3, f"{kind}.{name} has no type, default and meaning"
        else:
            kind = line or kind
    assert found == [(kind.__name__, name) for kind, name in FIELDS]


@pytest.mark.parametrize(
    ("part", "field", "kind", "default"),
    [
        ("ModelConfig", "pattern", "str", "required"),
        ("ModelConfig", "head_dim", "int", None),
        ("PlanConfig", "capacity_factor", "float", None),
        ("PlanConfig", "remat", "str | tuple[str, ...]", "none"),
        ("TrainConfig", "router_bias_update_rate", "float", 1e-3),
        ("DataConfig", "shuffle", "bool", True),
        ("OptimizerConfig", "learning_rate", "float", "required"),
    ],
)
def test_a_field_is_named_typed_and_has_its_default(capsys, part, field, kind, default):
    (row,) = (row for row in json.loads(printed(capsys, "--json"))[part] if row["name"] == field)
    assert row["type"] == kind
    assert ("default" not in row) if default == "required" else (row["default"] == default)


def test_meanings_say_something_of_their_own(capsys):
    for part, fields in json.loads(printed(capsys, "--json")).items():
        meanings = [row["meaning"] for row in fields]
        assert len(set(meanings)) == len(meanings), part
        for row in fields:
            assert re.search(r"\w+ \w+", row["meaning"]) and "\n" not in row["meaning"], (part, row["name"])


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field}" for kind, field in FIELDS])
def test_a_meaning_names_every_choice(capsys, kind, field):
    """The choices are those that the refusal of an unknown word lists."""
    good = GOOD[kind]
    try:
        kind(**{**good, field: "no such word"})
    except ConfigError as error:
        choices = re.fullmatch(rf"{kind.__name__}\.{field} is 'no such word'; expected one of (.*)", str(error))
        if choices is None or field == "remat":  # its words and names are in config/remat.py
            return
        (row,) = (row for row in json.loads(printed(capsys, "--json"))[kind.__name__] if row["name"] == field)
        words = set(re.findall(r"[\w.]+", row["meaning"]))
        assert [word for word in choices[1].split(", ") if word not in words] == []


def test_fields_need_no_gin_file_and_take_none(capsys):
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "one of the arguments --gin_file --fields is required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--fields", "--gin_file", "a.gin"])
    assert "not allowed with argument" in capsys.readouterr().err
    assert main(["plan", "--fields", "--gin_bindings", "PlanConfig.tensor=2"]) == 2
    assert "--fields lists every field; expected it without --gin_bindings" in capsys.readouterr().err
