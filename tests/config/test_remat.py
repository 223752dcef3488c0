"""The names that entries of PlanConfig.remat choose, and the entries that are refused."""

import pytest
from tests.helpers import run_config

from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.remat import MODULES, Remat, check_layers, names_of


def recomputed(remat, letter: str) -> set[str]:
    found = PlanConfig(remat=remat).layer_remat(letter)
    assert found.kind == "names"
    return set(found.again)


@pytest.mark.parametrize("word", ("none", "full", "elementwise"))
def test_a_word_for_whole_layers_applies_to_every_layer(word):
    assert {PlanConfig(remat=word).layer_remat(letter) for letter in LAYERS} == {Remat(word)}


def test_a_name_applies_to_the_layers_that_have_it_and_others_recompute_nothing():
    assert recomputed("conv", "M") == recomputed(("conv",), "m") == {"conv"}
    assert PlanConfig(remat="conv").layer_remat("*") == Remat("none")


def test_letters_before_a_colon_choose_layers():
    remat = ("M:conv,gated_norm", "*w:core", "E:full")
    assert recomputed(remat, "M") == {"conv", "gated_norm"}
    assert recomputed(remat, "*") == recomputed(remat, "w") == {"core"}
    assert PlanConfig(remat=remat).layer_remat("E") == Remat("full")
    assert PlanConfig(remat=remat).layer_remat("m") == Remat("none")


def test_words_and_names_add_up():
    assert recomputed(("selective", "norm"), "*") == {"core", "norm"}
    assert recomputed(("paper", "M:conv"), "M") == {"conv"}
    assert recomputed("paper", "E") == recomputed("selective", "-") == set()
    assert all(recomputed("selective", letter) == kind.selective <= {*kind.names} for letter, kind in LAYERS.items())


def test_megatrons_modules_are_names():
    assert recomputed("mla_up_proj", "+") == {"query", "key", "value"}
    assert PlanConfig(remat="mla_up_proj").layer_remat("*") == Remat("none")
    assert recomputed("moe_act", "E") == {"expert_activation"}
    assert recomputed("layernorm", "-") == {"norm"}
    assert "rows" in recomputed("moe", "E") and PlanConfig(remat="moe").layer_remat("+") == Remat("none")
    assert all(set(names) <= set(names_of(LAYERS)) for names in MODULES.values())


@pytest.mark.parametrize(
    ("remat", "expected"),
    [
        ("some", "expected one of none, full, elementwise, selective, paper, norm, in_proj, "),
        (("conv", "convolution"), "not 'convolution'"),
        ("input", "not 'input'"),
        ((), None),
        ("", "not ''"),
        ("X:conv", "expected letters of Mm*w+-Exg before the colon, not 'X'"),
        ("M*:conv", "expected one of norm, query, key, value, core, attention for layers *, not 'conv'"),
        (("M:full", "conv"), "expected one choice for layers M, not conv and full"),
        (("full", "E:none"), "expected one choice for layers E, not full and none"),
        (7, "a value of type str | tuple[str, ...]"),
    ],
)
def test_a_meaningless_entry_is_refused_with_the_known_ones(remat, expected):
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
    with pytest.raises(
        ConfigError, match=r"expected names that the model's layers M\*-E have \(norm, .*\), not layers m"
    ):
        run_config(plan={"remat": "m:conv"}).check()
    with pytest.raises(ConfigError, match=r"not 'scan_states'"):
        run_config(plan={"remat": ("core", "scan_states")}).check()
    with pytest.raises(ConfigError, match=r"layers - have \(norm, up, activation\), not 'core'"):
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
    with pytest.raises(ConfigError, match=r"PlanConfig.offload is \('selective',\); expected some of input, norm, "):
        PlanConfig(offload=("selective",))
    with pytest.raises(ConfigError, match=r"PlanConfig.offload is \('scan',\); expected names that .* not 'scan'"):
        run_config(plan={"offload": ("scan",)}).check()
