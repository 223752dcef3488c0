"""Fields that config.json leaves out, sets to null or names otherwise mean what they mean to transformers."""

import json

import pytest
from tests.convert.sweep import bases, changed, complete, edits, recorded

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.convert.config import read_config

# A config that transformers' config class accepts and its model class cannot read.
BROKEN = {("nemotron older", "partial_rotary_factor null")}


def read(values: dict) -> ModelConfig | str:
    """The model of a config.json, or "refused"."""
    try:
        return read_config(values)[1]
    except ConfigError:
        return "refused"


@pytest.mark.parametrize("name", bases())
def test_an_incomplete_config_equals_the_one_that_transformers_completes(name):
    base, expected = bases()[name], recorded()[name]
    whole = changed(base, expected["as it is"])
    assert read(whole) != "refused"
    wrong = {}
    for edit, values in edits(base):
        completed = expected[edit]
        if completed is not None and (name, edit) not in BROKEN and read(values) != read(changed(whole, completed)):
            wrong[edit] = read(values), completed
    assert not wrong


@pytest.mark.peer
@pytest.mark.parametrize("name", bases())
def test_the_record_is_what_transformers_does(name, tmp_path):
    transformers = pytest.importorskip("transformers")

    def load(values: dict) -> dict:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return json.loads(transformers.AutoConfig.from_pretrained(tmp_path).to_json_string(use_diff=False))

    assert complete(bases()[name], load) == recorded()[name]


def test_the_sweep_covers_every_edit():
    assert {name: set(found) for name, found in recorded().items()} == {
        name: {edit for edit, _ in edits(base)} for name, base in bases().items()
    }
