"""Settings that nothing reads, in files: on loading, on saving and across includes."""

import pytest
from tests.config.test_reads import a_run

from orogen.config.checks import ConfigError
from orogen.config.load import load, load_saved
from orogen.config.plan import PlanConfig
from orogen.config.text import model_text


@pytest.fixture
def file(tmp_path):
    """A gin file of a model of one Mamba-2 layer."""
    written = tmp_path / "model.gin"
    fields = ("pattern", "vocab_size", "hidden_size", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
    model = a_run().model
    written.write_text("".join(f"ModelConfig.{f} = {getattr(model, f)!r}\n" for f in fields))
    return written


def test_load_refuses_a_setting_in_a_file_and_on_the_command_line(file):
    expected = (
        "ModelConfig.sliding_window is 4; expected None, since nothing reads it: the model has no layers of "
        "sliding-window attention (w)"
    )
    line = "ModelConfig.sliding_window = 4"
    for files, bindings in (([file], [line]), ([file, file.with_name("more.gin")], [])):
        file.with_name("more.gin").write_text(line + "\n")
        with pytest.raises(ConfigError) as caught:
            load(files, bindings)
        assert str(caught.value) == expected


def test_a_binding_of_the_default_changes_nothing(file):
    """Operative text and a converted model's file bind every field."""
    config, text = load([file], ["ModelConfig.sliding_window = None", "PlanConfig.expert = 1"])
    again = file.with_name("again.gin")
    again.write_text(text)
    assert load([again]) == (config, text)
    again.write_text(model_text(config.model))
    assert load([again])[0].model == config.model


def test_an_override_back_to_the_default_makes_a_plan_for_experts_legal(file):
    plan = file.with_name("plan.gin")
    plan.write_text("PlanConfig.expert = 2\nPlanConfig.data = 2\n")
    with pytest.raises(ConfigError, match=r"PlanConfig.expert is 2; expected 1, since nothing reads it"):
        load([file, plan])
    assert load([file, plan], ["PlanConfig.expert = 1"])[0].plan == PlanConfig(data=2)


def test_a_saved_file_with_an_unread_setting_is_read_without_it(file):
    """Earlier versions accepted such settings and saved them in the run's folder."""
    without = load([file])[0]
    file.write_text(file.read_text() + "ModelConfig.head_dim = 3\nPlanConfig.virtual = 1\n")
    assert load_saved(file) == without


def test_a_saved_file_with_a_removed_field_is_read_if_its_choice_is_what_happens(file):
    without, text = load([file])[0], file.read_text()
    file.write_text(text + "PlanConfig.stash = 'copied'\n")
    assert load_saved(file) == without
    with pytest.raises(ConfigError, match="stash"):
        load([file])
    file.write_text(text + "PlanConfig.stash = 'in_place'\n")
    with pytest.raises(ConfigError, match="stash"):
        load_saved(file)


def test_an_include_that_overrides_a_binding_above_it_is_refused(file):
    inner, outer = file.with_name("inner.gin"), file.with_name("outer.gin")
    inner.write_text("include 'model.gin'\n")
    outer.write_text("PlanConfig.data = 2\nModelConfig.hidden_size = 24\ninclude 'inner.gin'\n")
    with pytest.raises(ConfigError) as caught:
        load([outer])
    assert str(caught.value) == (
        f"{outer}, line 3: include 'inner.gin' overrides ModelConfig.hidden_size, which is bound above it; "
        "expected the include before the binding"
    )
    outer.write_text("PlanConfig.data = 2\ninclude 'inner.gin'\nModelConfig.hidden_size = 24\n")
    assert load([outer])[0].model.hidden_size == 24
