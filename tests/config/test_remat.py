"""Which names the entries of PlanConfig.remat choose, and which entries are refused."""

import pytest
from tests.helpers import run_config

from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.remat import EVERY, MODULES, NAMES, SELECTIVE, Remat, check_layers


def again(remat, letter: str) -> set[str]:
    found = PlanConfig(remat=remat).layer_remat(letter)
    assert found.kind == "names"
    return set(found.again)


@pytest.mark.parametrize("word", ("none", "full", "elementwise"))
def test_a_word_for_a_whole_layer_is_for_every_layer(word):
    assert {PlanConfig(remat=word).layer_remat(letter) for letter in EVERY} == {Remat(word)}


def test_a_name_is_for_the_layers_that_have_it_and_the_others_recompute_nothing():
    assert again("conv", "M") == again(("conv",), "m") == {"conv"}
    assert PlanConfig(remat="conv").layer_remat("*") == Remat("none")


def test_letters_before_a_colon_choose_layers():
    remat = ("M:conv,gated_norm", "*w:core", "E:full")
    assert again(remat, "M") == {"conv", "gated_norm"}
    assert again(remat, "*") == again(remat, "w") == {"core"}
    assert PlanConfig(remat=remat).layer_remat("E") == Remat("full")
    assert PlanConfig(remat=remat).layer_remat("m") == Remat("none")


def test_words_and_names_add_up():
    assert again(("selective", "norm"), "*") == {"core", "norm"}
    assert again(("paper", "M:conv"), "M") == {"conv"}
    assert again("paper", "E") == again("selective", "-") == set()
    assert all(again("selective", letter) == names for letter, names in SELECTIVE.items())


def test_megatrons_modules_are_names():
    assert again("mla_up_proj", "+") == {"query", "key", "value"}
    assert PlanConfig(remat="mla_up_proj").layer_remat("*") == Remat("none")
    assert again("moe_act", "E") == {"expert_activation"}
    assert again("layernorm", "-") == {"norm"}
    assert "rows" in again("moe", "E") and PlanConfig(remat="moe").layer_remat("+") == Remat("none")
    assert all(set(names) <= set(NAMES) for names in MODULES.values())


@pytest.mark.parametrize(
    ("remat", "expected"),
    [
        ("some", "expected one of none, full, elementwise, selective, paper, norm, query, "),
        (("conv", "convolution"), "not 'convolution'"),
        ("input", "not 'input'"),
        ((), None),
        ("", "not ''"),
        ("X:conv", "expected letters of Mm*w+-E before the colon, not 'X'"),
        ("M*:conv", "expected of layers * one of norm, query, key, value, core, attention, not 'conv'"),
        (("M:full", "conv"), "expected one choice for layers M, not conv and full"),
        (("full", "E:none"), "expected one choice for layers E, not full and none"),
        (7, "a value of type str | tuple[str, ...]"),
    ],
)
def test_an_entry_that_means_nothing_is_refused_with_what_is_known(remat, expected):
    if expected is None:
        assert PlanConfig(remat=remat).layer_remat("M") == Remat("none")
        return
    with pytest.raises(ConfigError) as caught:
        PlanConfig(remat=remat)
    message = str(caught.value)
    assert message.startswith(f"PlanConfig.remat is {remat!r}; expected ") and expected in message
    assert "\n" not in message


def test_names_of_layers_that_the_model_lacks_are_refused_with_those_it_has():
    run_config(plan={"remat": ("M:conv", "core")}).check()
    with pytest.raises(ConfigError, match=r"expected what the model's layers M\*-E have, norm, .*; not layers m"):
        run_config(plan={"remat": "m:conv"}).check()
    with pytest.raises(ConfigError, match=r"not 'scan_states'"):
        run_config(plan={"remat": ("core", "scan_states")}).check()
    with pytest.raises(ConfigError, match=r"layers - have, norm, up, activation; not 'core'"):
        check_layers("remat", "core", "-")


def test_gin_binds_a_word_a_name_or_entries(tmp_path):
    file = tmp_path / "plan.gin"
    for text, expected in (
        ("'selective'", "selective"),
        ("('M:conv,gated_norm', '*:core')", ("M:conv,gated_norm", "*:core")),
        ("['conv', 'core']", ("conv", "core")),
    ):
        file.write_text(f"PlanConfig.remat = {text}\n")
        config, operative = load([file])
        assert config.plan.remat == expected
        file.write_text(operative)
        assert load([file])[0] == config


def test_offload_takes_names_of_the_models_layers():
    assert PlanConfig(offload=["input", "conv"]).layer_remat("M").host == {"input", "conv"}  # pyright: ignore[reportArgumentType]
    assert PlanConfig(offload=("conv",)).layer_remat("M") == Remat("names", frozenset(), frozenset({"conv"}))
    assert PlanConfig(offload=("conv",)).layer_remat("*") == Remat("none")
    assert PlanConfig(offload=("conv",), remat="full").layer_remat("M").kind == "full"
    with pytest.raises(ConfigError, match=r"PlanConfig.offload is \('selective',\); expected names of input, norm, "):
        PlanConfig(offload=("selective",))
    with pytest.raises(ConfigError, match=r"PlanConfig.offload is \('scan',\); expected what .* not 'scan'"):
        run_config(plan={"offload": ("scan",)}).check()
