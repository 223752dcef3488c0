"""The README and the other pages that it links to: short, and true of the command line and the files."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from orogen.cli import make_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "experiments/README.md", "CHANGELOG.md", *map(str, ROOT.glob("experiments/*/README.md")))
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^orogen .*$", README, flags=re.MULTILINE)


def test_the_readme_takes_ten_minutes():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=[Path(page).parent.name or page for page in PAGES])
def test_links_lead_somewhere(page):
    folder, text = (ROOT / page).parent, (ROOT / page).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert [link for link in links if not (folder / link).exists()] == []


def test_files_that_the_readme_names_exist():
    named = re.findall(r"`((?:src|gin_configs|experiments)/[\w./]+)`", README)
    named += [f"src/orogen/{file}" for file in re.findall(r"^\d\. `([\w./]+)`", README, flags=re.MULTILINE)]
    assert len(named) > 10 and [file for file in named if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_are_commands(command):
    _, *arguments = shlex.split(command)
    assert make_parser().parse_args(arguments)


def test_the_readme_names_every_task():
    (tasks,) = (action for action in make_parser()._actions if action.dest == "==SUPPRESS==" and action.choices)
    assert COMMANDS and [task for task in tasks.choices if f"`orogen {task} " not in README] == []


def experiment(file):
    """The module of a script in experiments/."""
    spec = importlib.util.spec_from_file_location(file.replace("/", "_"), ROOT / "experiments" / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_cache_parity_are_those_of_its_results():
    run = experiment("cache_parity/run")
    results, page = run.read(), (ROOT / "experiments/cache_parity/README.md").read_text()
    assert results and all(run.table(results, exact=exact) in page for exact in (False, True))


@pytest.fixture(scope="module")
def studies():
    page = experiment("page")
    return page, page.studies()


def test_pages_of_results_are_what_the_folders_say(studies):
    """`python experiments/page.py` writes them."""
    page, found = studies
    assert len(found) >= 7
    assert [str(path) for path, text in page.pages(found).items() if path.read_text() != text] == []


def test_a_study_has_a_verdict_if_it_has_been_run(studies):
    page, found = studies
    run = {study.folder: any(one.is_run for one in found if one.folder == study.folder) for study in found}
    for study in found:
        assert run[study.folder] == bool(page.paragraph(study.folder, "Verdict")), study.folder.name
        arms = {arm.values for arm in study.sweep.arms()}
        done = {(tuple(line["arm"]), line["seed"]) for line in study.lines if not line["search"]}
        assert done in (set(), {(arm, seed) for arm in arms for seed in study.sweep.seeds}), study.folder.name
