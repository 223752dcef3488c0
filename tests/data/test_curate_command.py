"""`orogen curate` as a user meets it."""

import importlib.util
import json

import pytest

from orogen.cli import main

from .curate.corpora import nearly, texts, write_jsonl


@pytest.fixture
def gin(tmp_path):
    """A gin file of one source with a copy, a near copy and a broken line."""
    one, two = texts(2)
    write_jsonl(tmp_path / "in" / "a<b>.jsonl", [one, two, one, nearly(two), b"{"])
    file = tmp_path / "a.gin"
    file.write_text(
        f"CurateConfig.sources = [('web', {str(tmp_path / 'in')!r})]\n"
        "CurateConfig.stages = [@LanguageConfig(), @DedupConfig()]\n"
        "LanguageConfig.languages = []\nLanguageConfig.min_probability = 0.0\nDedupConfig.bands = 4\n"
        "DedupConfig.rows = 3\n"
    )
    return file


def test_a_curation_its_report_and_a_second_call(gin, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["curate", "--gin_file", str(gin), "--out", str(out), "--workers", "1"]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["stages"]["write"]["left"]["documents"] == 2 and "dedup" in facts["stages"]
    assert {entry.name for entry in out.iterdir()} == {
        "documents", "manifest.json", "report.json", "report.html", "broken.jsonl", "config.gin",
        "stages.png", "lengths.png", "curve.png", "languages.png",
    }  # fmt: skip
    page = (out / "report.html").read_text()
    for shown in ("exact duplicate", "fuzzy duplicate", "malformed JSON", "kept: web/a&lt;b&gt;.jsonl:1"):
        assert shown in page
    assert "a<b>" not in page and page.count("<img") == 4
    assert main(command) == 0  # it is done
    assert "2 documents" in capsys.readouterr().out


def test_bad_input_is_one_line(gin, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "out")]
    wrong = [
        ["--gin_file", str(tmp_path / "none.gin"), *out],
        ["--gin_file", str(gin), "--gin_bindings", "CurateConfig.sources = [('a', '/nowhere')]", *out],
        ["--gin_file", str(gin), "--gin_bindings", "DedupConfig.rows = 'many'", *out],
        ["--gin_file", str(gin), "--out", str(gin)],
        ["--gin_file", str(gin), "--executor", "slurm", *out],
    ]
    for arguments in wrong:
        assert main(["curate", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "py3langid" else find(name))
    assert main(["curate", "--gin_file", str(gin), *out]) == 2
    assert "needs py3langid; expected pip install 'orogen[curate]'" in capsys.readouterr().err
