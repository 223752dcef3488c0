"""Gin files that come with Orogen are found from any working directory, and a wheel holds them."""

from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.shipped import SHIPPED, find

ROOT = Path(__file__).parents[2]
QUICKSTART = "gin_configs/recipes/quickstart.gin"


def test_a_recipe_is_found_outside_the_checkout(tmp_path, monkeypatch):
    config, text = load([ROOT / QUICKSTART])
    monkeypatch.chdir(tmp_path)
    assert load([QUICKSTART]) == (config, text)
    assert find(Path(QUICKSTART)) == SHIPPED / "recipes" / "quickstart.gin"


def test_an_existing_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path(QUICKSTART)
    own.parent.mkdir(parents=True)
    own.write_text("TrainConfig.steps = 7\nTrainConfig.batch_size = 2\nTrainConfig.sequence_length = 8\n"
                   "TrainConfig.seed = 0\n")  # fmt: skip
    assert load([QUICKSTART])[0].train.steps == 7


@pytest.mark.parametrize("name", ["gin_configs/recipes/none.gin", "recipes/quickstart.gin", "gin_configs"])
def test_other_names_do_not_exist(tmp_path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"gin file '{name}' does not exist"):
        load([name])


def test_a_wheel_holds_every_gin_file():
    """Checked by the packages and patterns that setuptools reads, since building a wheel takes seconds."""
    settings = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]
    packages, patterns = set(settings["packages"]), settings["package-data"][""]  # "" stands for every package
    held = {file.relative_to(ROOT / "gin_configs") for file in (ROOT / "gin_configs").rglob("*.gin")}
    assert len(held) > 30
    for file in held:
        folder = Path("orogen", "gin_configs", file.parent)
        assert ".".join(folder.parts) in packages
        assert (ROOT / "src" / folder / file.name).is_file()
        assert any(file.match(pattern) for pattern in patterns)
