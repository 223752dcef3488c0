"""DataConfig refuses illegal values by name, value and expectation; the gin files build."""

import dataclasses
import pathlib
import re

import pytest

from orogen.config.data import DataConfig
from orogen.config.load import load

GIN = pathlib.Path(__file__).parents[2] / "gin_configs" / "data"
GOOD = {"corpus": "stdlib", "tokenizer": "bpe", "vocab_size": 300}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("corpus", "", "a non-empty string"),
        ("corpus", 3, "type str"),
        ("tokenizer", "", "a non-empty string"),
        ("text_field", "", "a non-empty string"),
        ("heldout_fraction", "0.1", "type float"),
        ("heldout_fraction", -0.1, "from 0 to below 1"),
        ("heldout_fraction", 1.0, "from 0 to below 1"),
        ("tuning_fraction", float("nan"), "from 0 to below 1"),
        ("tuning_fraction", 0.95, "less than the 0.95 not held out"),
        ("seed", -1, "from 0 to 2"),
        ("seed", 2**32, "from 0 to 2"),
        ("seed", True, "type int"),
        ("shuffle", 1, "type bool"),
        ("vocab_size", None, "at least 259"),
        ("vocab_size", 258, "at least 259"),
    ],
)
def test_refusals_name_field_value_and_expectation(field, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"DataConfig.{field} is {value!r}") + ".*" + re.escape(expected)):
        DataConfig(**{**GOOD, field: value})


@pytest.mark.parametrize(("tokenizer", "size"), [("byte", 258), ("byte", 260), ("some/tokenizer.json", 0)])
def test_a_vocab_size_that_the_tokenizer_cannot_have_is_refused(tokenizer, size):
    with pytest.raises(ValueError, match=f"DataConfig.vocab_size is {size}"):
        DataConfig(corpus="stdlib", tokenizer=tokenizer, vocab_size=size)


def test_the_limits_themselves_are_accepted():
    DataConfig(**{**GOOD, "vocab_size": 259, "seed": 2**32 - 1, "heldout_fraction": 0, "tuning_fraction": 0.0})
    DataConfig(corpus="stdlib", tokenizer="byte", vocab_size=259)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stdlib", DataConfig(corpus="stdlib", tokenizer="bpe", vocab_size=4096)),
        ("stdlib_bytes", DataConfig(corpus="stdlib", tokenizer="byte", vocab_size=259)),
    ],
)
def test_gin_files_build(name, expected):
    config, _ = load([GIN / f"{name}.gin"])
    assert dataclasses.asdict(config.data) == dataclasses.asdict(expected)
