"""The formats in which each layer computes, and which formats exist."""

import pytest
from tests.helpers import hybrid

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.config.recipe import FP8, IN_FP8, RECIPES, Formats, Recipe, layer_recipes


@pytest.mark.parametrize(
    ("pattern", "rounded"),
    [("-", [0]), ("M-", [0, 0]), ("M-*E", [0, 1, 1, 0]), ("ME|*-/*E", [0, 1, 1, 0, 0, 0])],
)
def test_all_layers_but_the_first_the_last_and_the_mtp_block_use_fp8(pattern, rounded):
    model = hybrid(pattern=pattern, mtp_depths=int("/" in pattern))
    recipes = layer_recipes(PlanConfig(linear="fp8"), model)
    assert [FP8 in recipe.names() for recipe in recipes] == [bool(n) for n in rounded]
    assert {recipe.linear for recipe in recipes if FP8 in recipe.names()} <= {IN_FP8}
    assert set(layer_recipes(PlanConfig(), model)) == {Recipe()}


def test_experts_and_head_use_the_compute_dtype_only():
    assert RECIPES[FP8].grouped == RECIPES[FP8].head == Formats()
    for kind in ("grouped", "head"):
        with pytest.raises(ConfigError, match=rf"Recipe.{kind} is Formats\(forward='fp8', .*; expected Formats\(forw"):
            Recipe(**{kind: IN_FP8})


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="Formats.input_gradient is 'nvfp4'; expected one of plain, fp8"):
        Formats(input_gradient="nvfp4")


def test_recipes_are_static():
    """They are compared and hashed by value, as static arguments of a trace must be."""
    assert len({Recipe(), Recipe(linear=IN_FP8), Recipe(linear=Formats(forward=FP8)), RECIPES[FP8]}) == 3
