"""Every gin file of the repository loads, and each recipe gives the operative text and the plan that were recorded.

After a change that is meant, `python tests/test_configs.py --write` records anew; read the difference first.
"""

import difflib
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orogen.config.load import load, load_curation, load_part, load_prune, load_quantization, load_search
from orogen.config.upcycle import UpcycleConfig
from orogen.model.lm import build
from orogen.parallel.describe import describe_plan
from orogen.parallel.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "gin_configs"
GOLDENS = ROOT / "tests" / "goldens"
RECIPES = sorted((CONFIGS / "recipes").glob("*.gin"))
COMMAND = "python tests/test_configs.py --write"

stem = lambda file: file.stem  # noqa: E731
parameters = functools.cache(lambda model: build(model).params)  # the largest take seconds, and recipes share some
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=stem)


def table(recipe: Path) -> dict[str, Any]:
    """Mesh, logical axes and every parameter's shapes under the recipe's plan; needs no devices."""
    config, _ = load([recipe])
    plan = make_plan(config.plan, config.need("model").model, abstract=True)
    return describe_plan(plan, parameters(config.model))


def json_lines(facts: dict[str, Any]) -> str:
    """JSON with one line per mesh axis, logical axis and parameter, so that a difference shows what moved."""

    def block(value: Any) -> str:
        if not isinstance(value, dict):
            return json.dumps(value)
        return "{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"

    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {block(value)}" for key, value in facts.items()) + "\n}\n"


def records(recipe: Path) -> dict[Path, str]:
    """What is recorded of a recipe, by file."""
    return {
        GOLDENS / f"{recipe.stem}.gin": load([recipe])[1],
        GOLDENS / f"{recipe.stem}.json": json_lines(table(recipe)),
    }


def check(file: Path, text: str) -> None:
    """Fails with the difference unless `file` holds `text`."""
    before = file.read_text() if file.exists() else ""
    changes = list(difflib.unified_diff(before.splitlines(), text.splitlines(), file.name, "now", lineterm="", n=0))
    if changes:
        pytest.fail("\n".join([f"if this is meant: {COMMAND}", *changes]), pytrace=False)


@pytest.mark.parametrize("file", sorted((CONFIGS / "models").glob("*.gin")), ids=stem)
def test_model_builds_abstractly(file):
    config, _ = load([file])
    assert config.model is not None and config.data is config.train is config.optimizer is None
    assert parameters(config.model)


@pytest.mark.parametrize("file", sorted((CONFIGS / "plans").glob("*.gin")), ids=stem)
def test_plan_file_holds_a_plan_alone(file):
    config, text = load([file])
    assert config.plan.devices >= 1
    assert config.model is config.data is config.train is config.optimizer is None
    assert "PlanConfig" in text


@pytest.mark.parametrize("file", sorted((CONFIGS / "upcycle").glob("*.gin")), ids=stem)
def test_upcycle_file_says_how_a_model_is_upcycled(file):
    assert load_part(UpcycleConfig, [file]).experts > 1


@pytest.mark.parametrize("file", sorted((CONFIGS / "prune").glob("*.gin")), ids=stem)
def test_prune_file_says_what_is_pruned_and_begins_with_its_command(file):
    settings, run = load_prune([file])
    assert settings.widths and run.model is run.data is None
    assert f"# orogen prune --checkpoint HF_FOLDER --gin_file gin_configs/prune/{file.name} " in file.read_text()


@pytest.mark.parametrize("file", sorted((CONFIGS / "quantize").glob("*.gin")), ids=stem)
def test_quantize_file_suits_the_published_models(file):
    _, _, config = load_quantization([file], [])
    for name in ("nemotron3_nano_30b_a3b", "nemotron3_super_120b_a12b"):
        model = load([CONFIGS / "models" / f"{name}.gin"])[0].model
        assert any(names != ("plain",) for layer in config.choices(model) for names in layer.values())
    assert f"# orogen quantize --checkpoint HF_FOLDER --gin_file gin_configs/quantize/{file.name} " in file.read_text()


# The task of a recipe after pretraining, by the part that it alone reads; those without one train as before.
TASKS = {"chat": "sft", "preference": "dpo", "distill": "distill", "rl": "rl"}


@pytest.mark.parametrize("file", sorted((CONFIGS / "posttrain").glob("*.gin")), ids=stem)
def test_posttraining_file_suits_a_model_and_begins_with_its_command(file, tmp_path):
    text = file.read_text()
    other = [] if "OptimizerConfig." in text else ["OptimizerConfig.learning_rate = 1e-4"]  # given with the data
    model = [] if "ModelConfig." in text else [CONFIGS / "models" / "nemotron_nano_9b_v2.gin"]
    config, written = load([*model, file], other)
    tasks = [task for part, task in TASKS.items() if getattr(config, part) is not None] or ["train"]
    assert len(tasks) == 1 and text.startswith(f"# orogen {tasks[0]} ")
    assert f" --gin_file gin_configs/posttrain/{file.name} " in text.splitlines()[0]
    (tmp_path / "again.gin").write_text(written)
    assert load([tmp_path / "again.gin"])[0] == config


@pytest.mark.parametrize("file", sorted((CONFIGS / "data").glob("*.gin")), ids=stem)
def test_data_file_holds_data_alone(file):
    config, _ = load([file])
    assert config.data is not None and config.model is config.train is config.optimizer is None


@pytest.mark.parametrize("file", sorted((CONFIGS / "search").glob("*.gin")), ids=stem)
def test_search_file_names_a_model_and_begins_with_its_command(file):
    model, search, _, _ = load_search([file])
    assert model is not None and search.budgets and search.widths(model)
    assert file.read_text().startswith(f"# orogen search --gin_file gin_configs/search/{file.name}\n")


@pytest.mark.parametrize("file", sorted((CONFIGS / "curation").glob("*.gin")), ids=stem)
def test_curation_file_loads_and_begins_with_its_command(file, tmp_path):
    config, text = load_curation([file])
    (tmp_path / "again.gin").write_text(text)
    assert load_curation([tmp_path / "again.gin"])[0] == config
    assert f"# orogen curate --gin_file gin_configs/curation/{file.name} --out " in file.read_text()


@recipes
def test_recipe_is_whole(recipe):
    config, _ = load([recipe])
    config.need("model", "data", "train", "optimizer")
    make_plan(config.plan, config.model, abstract=True)
    if config.data.vocab_size is not None:
        assert config.model.vocab_size == config.data.vocab_size


@recipes
def test_recipe_gives_what_was_recorded(recipe):
    for file, text in records(recipe).items():
        check(file, text)


@recipes
def test_recorded_text_loads_to_the_recipes_config(recipe):
    assert load([GOLDENS / f"{recipe.stem}.gin"])[0] == load([recipe])[0]


@recipes
def test_recorded_table_has_a_row_a_parameter(recipe):
    facts = json.loads((GOLDENS / f"{recipe.stem}.json").read_text())
    assert {"devices", "mesh", "logical_axes", "parameters"} == set(facts)
    assert all({"shape", "axes", "device_shape", "stored_shape"} == set(row) for row in facts["parameters"].values())


def test_no_record_outlives_its_recipe():
    expected = {f"{recipe.stem}{suffix}" for recipe in RECIPES for suffix in (".gin", ".json")}
    assert {file.name for file in GOLDENS.iterdir() if file.suffix in (".gin", ".json")} == expected


def test_every_gin_file_is_of_a_known_kind():
    kinds = "models plans precision data recipes curation posttrain upcycle prune quantize search".split()
    known = [file for kind in kinds for file in (CONFIGS / kind).glob("*.gin")]
    assert sorted(known) == sorted(CONFIGS.rglob("*.gin"))


def test_a_difference_is_shown_with_the_command_that_records_it(tmp_path):
    (tmp_path / "a.gin").write_text("X.y = 1\nX.z = 2\n")
    with pytest.raises(pytest.fail.Exception) as caught:
        check(tmp_path / "a.gin", "X.y = 1\nX.z = 3\n")
    message = str(caught.value)
    assert COMMAND in message and "-X.z = 2\n+X.z = 3" in message and "X.y" not in message


def write() -> None:
    """Records every recipe anew and removes records of recipes that are gone."""
    GOLDENS.mkdir(exist_ok=True)
    now = {file: text for recipe in RECIPES for file, text in records(recipe).items()}
    for file in GOLDENS.iterdir():
        if file.suffix in (".gin", ".json") and file not in now:
            file.unlink()
    for file, text in now.items():
        file.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {COMMAND}")
    write()
