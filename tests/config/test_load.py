"""The gin loader: what it builds, and that it refuses, in one line, everything that gin silently ignores."""

import dataclasses
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.load import load, load_engine
from orogen.config.plan import PlanConfig
from orogen.config.run import PARTS

MAMBA = """
ModelConfig.pattern = 'M'
ModelConfig.vocab_size = 11
ModelConfig.hidden_size = 12
ModelConfig.mamba_num_heads = 4
ModelConfig.mamba_head_dim = 5
ModelConfig.n_groups = 2
ModelConfig.ssm_state_size = 3
"""
TRAIN = """
TrainConfig.steps = 7
TrainConfig.batch_size = 6
TrainConfig.sequence_length = 8
TrainConfig.seed = 1
"""
CLASSES = ", ".join(kind.__name__ for kind in PARTS.values())


@pytest.fixture
def write(tmp_path):
    """Writes a file into a folder of the test's own, two levels deep, so that tests share no parent folder."""

    def write_file(text: str, name: str = "home/run.gin") -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write_file


def refusal(*files: Path, bindings: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(files, bindings)
    message = str(caught.value)
    assert "\n" not in message and re.search(" object at 0x", message) is None, message
    return message


def test_a_model_alone_leaves_the_other_parts_none(write):
    config, _ = load([write(MAMBA)])
    assert config.model.hidden_size == 12
    assert config.plan == PlanConfig()  # all its fields have defaults
    assert config.data is config.train is config.optimizer is None


def test_need_names_the_class_without_bindings(write):
    config, _ = load([write(MAMBA)])
    assert config.need("model", "plan") is config
    with pytest.raises(ConfigError) as caught:
        config.need("model", "train")
    assert str(caught.value) == "the gin files have no bindings of TrainConfig; expected some, with its fields"


def test_bindings_come_after_files_and_files_in_order(write):
    first, second = write(MAMBA), write("ModelConfig.hidden_size = 24\n", "home/second.gin")
    assert load([first, second])[0].model.hidden_size == 24
    assert load([second, first])[0].model.hidden_size == 12
    assert load([first], ["ModelConfig.hidden_size = 36"])[0].model.hidden_size == 36


def test_a_file_overrides_what_it_includes(write):
    write(MAMBA, "home/base.gin")
    config, _ = load([write("include 'base.gin'\nModelConfig.hidden_size = 24\n")])
    assert config.model.hidden_size == 24


def test_includes_are_found_beside_the_file_and_in_its_parent_folder(write):
    write(MAMBA, "models/tiny.gin")
    write(TRAIN, "recipes/train.gin")
    config, _ = load([write("include 'models/tiny.gin'\ninclude 'train.gin'\n", "recipes/run.gin")])
    assert (config.model.hidden_size, config.train.steps) == (12, 7)


def test_includes_nest(write):
    write(MAMBA, "models/base.gin")
    write("include 'models/base.gin'\nModelConfig.chunk_size = 3\n", "models/wide.gin")
    config, _ = load([write("include 'models/wide.gin'\n", "recipes/run.gin")])
    assert (config.model.hidden_size, config.model.chunk_size) == (12, 3)


def test_includes_do_not_depend_on_the_current_folder(write, monkeypatch):
    write(MAMBA, "home/base.gin")
    decoy = write(MAMBA.replace("12", "36"), "elsewhere/base.gin")
    monkeypatch.chdir(decoy.parent)
    assert load([write("include 'base.gin'\n")])[0].model.hidden_size == 12


def test_a_relative_path_is_enough(write, monkeypatch):
    write(MAMBA, "home/base.gin")
    monkeypatch.chdir(write("include 'base.gin'\n").parent)
    assert load(["run.gin"])[0].model.hidden_size == 12


def test_an_include_is_not_looked_for_where_another_load_looked(write):
    write(MAMBA, "one/base.gin")
    write(MAMBA.replace("12", "36"), "two/x/base.gin")
    assert load([write("include 'base.gin'\n", "one/run.gin")])[0].model.hidden_size == 12
    assert load([write("include 'base.gin'\n", "two/x/run.gin")])[0].model.hidden_size == 36
    assert "does not exist" in refusal(write("include 'base.gin'\n", "three/x/run.gin"))


def test_no_binding_survives_into_the_next_load(write):
    train = write(TRAIN, "home/train.gin")
    load([write(MAMBA), train], ["TrainConfig.sample_tokens = 3", "PlanConfig.data = 2"])
    config, text = load([train])
    assert config.model is None and config.train.sample_tokens == 128 and config.plan == PlanConfig()
    assert "ModelConfig" not in text


def test_a_refused_load_leaves_nothing_behind(write):
    refusal(write(MAMBA + "WIDTH = 3\nTrainConfig.steps = 3\n"))
    config, _ = load([write(MAMBA)])
    assert config.train is None
    assert not logging.root.manager.disable


def test_a_config_built_in_python_ignores_what_was_loaded(write):
    load([write(MAMBA)], ["PlanConfig.data = 5"])
    assert PlanConfig().data == 1


def test_a_macro_sets_several_fields(write):
    text = "WIDTH = 24\n" + MAMBA.replace("= 12", "= %WIDTH") + "ModelConfig.chunk_size = %WIDTH\n"
    config, _ = load([write(text)], ["WIDTH = 36"])
    assert config.model.hidden_size == config.model.chunk_size == 36


def test_operative_text_reloads_to_an_equal_config(write):
    prompts = ("", "a\nb = 3\n", "'quoted' = \"x\"", "x" * 100, "%MACRO", "# no comment", "é\t\\n")
    text = "WIDTH = 24\n" + MAMBA.replace("= 12", "= %WIDTH") + TRAIN + f"TrainConfig.sample_prompts = {prompts!r}\n"
    text += "OptimizerConfig.learning_rate = 8e-3\nPlanConfig.data = 3\nDataConfig.corpus = 'stdlib'\n"
    text += "DataConfig.tokenizer = 'byte'\n"
    config, operative = load([write(text)])
    again, text_again = load([write(operative, "home/operative.gin")])
    assert config.train.sample_prompts == prompts
    assert (again, text_again) == (config, operative)


def test_operative_text_lists_defaults_too(write):
    _, operative = load([write(TRAIN)])
    fields = {f.name for f in dataclasses.fields(load([write(TRAIN)])[0].train)}
    assert fields == set(re.findall(r"^TrainConfig\.(\w+) =", operative, flags=re.MULTILINE))


REFUSED = {
    "misspelt field": (
        "ModelConfig.hiden_size = 3",
        "gin: Configurable 'ModelConfig' doesn't have a parameter named 'hiden_size'.",
    ),
    "misspelt class": ("ModelKonfig.hidden_size = 3", "gin: No configurable matching 'ModelKonfig'."),
    "class that no file may bind": ("RunConfig.model = None", "gin: No configurable matching 'RunConfig'."),
    "unused macro": ("WIDHT = 3", f"bindings that nothing read: WIDHT; expected fields of {CLASSES}"),
    "undefined macro": (
        "ModelConfig.chunk_size = %WIDTH",
        "gin: No bindings specified for 'WIDTH/gin.macro'",
    ),
    "field without its class": (
        "hidden_size = 3",
        f"bindings that nothing read: hidden_size; expected fields of {CLASSES}",
    ),
    "scope": (
        "train/ModelConfig.chunk_size = 3",
        f"bindings that nothing read: train/ModelConfig.chunk_size; expected fields of {CLASSES}",
    ),
    "class in a scope only": (
        "valid/DataConfig.corpus = 'stdlib'",
        f"bindings that nothing read: valid/DataConfig.corpus; expected fields of {CLASSES}",
    ),
    "unknown reference": (
        "ModelConfig.chunk_size = @Nothing()",
        "gin: No configurable matching reference '@Nothing()'.",
    ),
    "string for a number": (
        "ModelConfig.chunk_size = '3'",
        "ModelConfig.chunk_size is '3'; expected a value of type int",
    ),
    "bool for a number": (
        "ModelConfig.chunk_size = True",
        "ModelConfig.chunk_size is True; expected a value of type int",
    ),
    "bad value": ("ModelConfig.chunk_size = -3", "ModelConfig.chunk_size is -3; expected a number above 0"),
    "missing fields": (
        "TrainConfig.steps = 3",
        "gin: TrainConfig.__init__() missing 3 required keyword-only arguments: "
        "'batch_size', 'sequence_length', and 'seed'",
    ),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_bindings_are_refused_in_a_file_and_on_the_command_line(write, line, message):
    assert refusal(write(MAMBA + line + "\n")) == message
    assert refusal(write(MAMBA), bindings=(line,)) == message


UNREADABLE = {
    "no quotes": (
        "PlanConfig.fsdp = parameters",
        "cannot read the value parameters; expected a number, a quoted string, True, False, None or a list",
    ),
    # Open brackets and quotes are found by Python's tokenizer, whose messages differ since Python 3.12.
    "open bracket": (
        "TrainConfig.sample_prompts = ('a',",
        ("EOF in multi-line statement", "unexpected EOF in multi-line statement"),
    ),
    "open quote": ("ModelConfig.pattern = 'M", ("Unable to parse value.", "unterminated string literal")),
    "no value": ("ModelConfig.hidden_size", "Couldn't parse statement, expected ':' or '='."),
    "two values": ("ModelConfig.hidden_size = 3 4", "Expected newline."),
}


@pytest.mark.parametrize(("line", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_bad_syntax_is_refused_in_one_line_with_its_file(write, line, message):
    file = write(line + "\n")
    included = write(line + "\n", "home/bad.gin")
    messages = (message,) if isinstance(message, str) else message
    begins = lambda text, where: text.startswith(tuple(f"{where}: {m}" for m in messages))  # noqa: E731
    assert begins(refusal(file), file)
    assert begins(refusal(write("include 'bad.gin'\n"), included), included)
    assert begins(refusal(write(MAMBA), bindings=(line,)), "gin")


def test_bytes_that_are_not_text_are_refused(write):
    file = write("")
    file.write_bytes(b"\xff\xfe")
    assert refusal(file).startswith(f"{file}: 'utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("ModelConfig.hidden_size = 12", "ModelConfig.hidden_size"),
        ("orogen.config.model.ModelConfig.hidden_size = 12", "ModelConfig.hidden_size"),
        ("ModelConfig:\n  hidden_size = 12", "ModelConfig.hidden_size"),
        ("A = 1\nA = 2", "A"),
        ("b/PlanConfig.data = 1\nb/PlanConfig.data = 2", "b/PlanConfig.data"),
    ],
)
def test_a_key_twice_in_one_file_is_refused_with_its_line(write, line, key):
    file = write(MAMBA + line + "\n")
    where = len(MAMBA.splitlines()) + len(line.splitlines())
    assert refusal(file) == f"{file}, line {where}: {key} is bound twice; expected once"
    assert refusal(write("include 'twice.gin'\n", "home/x.gin"), write(MAMBA + line, "home/twice.gin")).endswith(
        f"twice.gin, line {where}: {key} is bound twice; expected once"
    )


def test_an_import_is_refused(write):
    file = write("import json\n" + MAMBA)
    assert refusal(file) == f"{file}, line 1: import json; expected bindings and includes only"


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (("import json",), "import json; expected bindings only"),
        (("from os import path",), "from os import path; expected bindings only"),
        (("include 'other.gin'",), "include 'other.gin'; expected bindings only"),
        (("PlanConfig.data = 2", "PlanConfig.data = 3"), "PlanConfig.data is bound twice; expected once"),
        (("A = 2\nA = 3",), "A is bound twice; expected once"),
    ],
)
def test_bindings_of_the_command_line_are_checked_like_files(write, bindings, message):
    assert refusal(write(MAMBA), bindings=bindings) == f"gin bindings: {message}"


def test_a_folder_is_refused_as_a_gin_file(tmp_path):
    assert refusal(tmp_path) == f"gin file {str(tmp_path)!r} is not a file"


def test_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "none.gin") == f"gin file {str(tmp_path / 'none.gin')!r} does not exist"


def test_missing_include_is_named_with_where_it_was_expected(write):
    file = write(MAMBA + "include 'none.gin'\n")
    folders = f"{file.parent} or {file.parent.parent}"
    assert refusal(file) == f"{file}, line 9: include 'none.gin' does not exist; expected it in {folders}"


def test_an_include_from_the_parent_folder_logs_nothing(write, caplog):
    write(MAMBA, "models/tiny.gin")
    load([write("include 'models/tiny.gin'\n", "recipes/run.gin")])
    assert caplog.records == []


def test_an_include_loop_is_refused(write):
    file = write("include 'back.gin'\n")
    back = write("include 'run.gin'\n", "home/back.gin")
    assert refusal(file) == f"{back}, line 1: include 'run.gin' leads back to itself"


def test_parts_that_do_not_fit_together_are_refused(write):
    assert refusal(write(TRAIN), bindings=("PlanConfig.data = 4",)) == (
        "TrainConfig.batch_size is 6; expected a multiple of data x microbatches = 4 x 1"
    )


def test_loading_imports_no_jax(write):
    file = write("include 'models/tiny.gin'\n", "recipes/run.gin")
    write(MAMBA, "models/tiny.gin")
    program = "import sys; from orogen.config.load import load; load(sys.argv[1:]); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


NESTED = {
    "parentheses": "ModelConfig.pattern = " + "(" * 5000,
    "brackets": "ModelConfig.pattern = " + "[" * 190 + "]" * 190,
    "signs": "ModelConfig.vocab_size = " + "-" * 50_000 + "1",
    "digits": "ModelConfig.vocab_size = " + "9" * 50_000,
    "a macro of itself": "A = %A\nModelConfig.chunk_size = %A",
    "a NUL": "ModelConfig.pattern = 'M\0'\n\0",
    "a lone surrogate": "DataConfig.corpus = '\\udc80'\nDataConfig.tokenizer = 'byte'",
}


@pytest.mark.parametrize("line", NESTED.values(), ids=NESTED)
def test_endless_values_are_refused_in_a_short_line(write, line):
    file = write(MAMBA.replace("ModelConfig.pattern = 'M'\n", "") + line + "\n")
    assert len(refusal(file)) < 1500


def test_a_gin_file_that_is_too_large_is_refused(write):
    file = write("#" * 100_001)
    assert refusal(file) == f"{file} has 100001 bytes; expected a gin file of at most 100000"


def test_endless_includes_are_refused(write):
    for number in range(30):  # each twice: 2**30 files
        write(f"include '{number + 1}.gin'\n" * 2, f"home/{number}.gin")
    file = write(MAMBA, "home/30.gin").with_name("0.gin")
    assert refusal(file) == f"{file} includes more than 100 files; expected fewer"


def test_bindings_alone_give_an_engine_and_its_plan():
    assert load_engine([]) == (None, EngineConfig())
    plan, engine = load_engine(["PlanConfig.tensor = 2", "PlanConfig.data = 3", "EngineConfig.queue = 5"])
    assert (plan, engine) == (PlanConfig(tensor=2, data=3), EngineConfig(queue=5))


def test_unbound_slots_and_length_follow_from_the_requests():
    assert load_engine([], rows=3, length=77)[1] == EngineConfig(slots=3, max_length=77)
    bindings = ["PlanConfig.tensor = 2", "PlanConfig.data = 2", "EngineConfig.max_length = 5"]
    assert load_engine(bindings, rows=3, length=77)[1] == EngineConfig(slots=4, max_length=5)
    assert load_engine(["N = 6", "EngineConfig.slots = %N"], rows=3)[1] == EngineConfig(slots=6)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["EngineConfig.slotz = 3"], "doesn't have a parameter named 'slotz'"),
        (["EngineConfig.slots = 'a'"], "EngineConfig.slots is 'a'; expected a value of type int"),
        (["TrainConfig.steps = 3"], "bindings that nothing read: TrainConfig.steps; expected fields of PlanConfig, "),
        (["a/EngineConfig.slots = 3"], "bindings that nothing read: a/EngineConfig.slots"),
        (["EngineConfig.slots = 3", "EngineConfig.slots = 4"], "EngineConfig.slots is bound twice"),
        (["include 'x.gin'"], "include 'x.gin'; expected bindings only"),
    ],
)
def test_bad_bindings_of_an_engine_are_refused(bindings, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_engine(bindings)
    assert "\n" not in str(caught.value)


def test_an_engine_is_not_part_of_a_run(write):
    assert "bindings that nothing read: EngineConfig.slots" in refusal(write(MAMBA + "EngineConfig.slots = 3\n"))
