"""`orogen evaluate`, and a run that is evaluated while it trains."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import bound, hybrid, run_config, write_recipe

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.evaluate import SUITES
from orogen.evaluate import command, harness
from orogen.evaluate import run as run_module
from orogen.evaluate.during import SLOTS, _engine, with_tasks
from orogen.infer.sizes import sizes_of
from orogen.report.metrics import read_metrics
from orogen.simulate.fit import Memory
from orogen.train.pretraining import PRETRAINING

LENGTHS = ("--lengths", "40,24", "--samples", "3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A run of three steps that evaluates tasks every second one, and a text."""
    folder = tmp_path_factory.mktemp("trained")
    recipe, run, text = write_recipe(folder), folder / "run", folder / "text.md"
    text.write_text("Größe → a text\n" * 3)
    bindings = bound(
        "TrainConfig.steps = 3", "TrainConfig.evaluate_every = 1", "TrainConfig.sample_tokens = 1",
        "EvaluateConfig.tasks = ('induction', 'copying')", "EvaluateConfig.every = 2",
        "EvaluateConfig.lengths = (40, 24)", "EvaluateConfig.samples = 3",
        f"EvaluateConfig.texts = ({str(text)!r},)",
    )  # fmt: skip
    assert main(["train", "--gin_file", str(recipe), "--run", str(run), *bindings]) == 0
    return run, text


def evaluated(capsys, *options: str | Path) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_evaluated_every_so_many_steps_and_the_command_finds_the_same(trained, tmp_path, capsys):
    run, text = trained
    records = {record["step"]: record for record in read_metrics(run)}
    scored = {step: {n: v for n, v in r.items() if n.startswith("evaluate/")} for step, r in records.items()}
    assert [step for step, found in scored.items() if found] == [2, 3]
    assert all("heldout_loss" in record for record in records.values())
    assert scored[2]["evaluate/induction/nats@40"] != scored[3]["evaluate/induction/nats@40"]
    assert "tasks.png" in {file.name for file in run.iterdir()} and "Tasks" in (run / "report.html").read_text()

    out = tmp_path / "out"
    options = ("--text", text, "--tasks", "induction,copying", *LENGTHS, "--out", out)
    answer = evaluated(capsys, "--checkpoint", run, *options)
    found = {f"evaluate/{task}/{n}": v for task, metrics in answer["results"].items() for n, v in metrics.items()}
    assert found.keys() == scored[3].keys()
    assert {name.rpartition("/")[2] for name in found} >= {
        "accuracy@40",
        "token_accuracy@24",
        "nats@24",
        "bits_per_byte",
    }
    assert all(abs(found[name] - value) < 1e-5 * max(1, abs(value)) for name, value in scored[3].items())
    assert json.loads((out / "results.json").read_text())["results"] == answer["results"]
    assert "copying" in (out / "results.txt").read_text() and (out / "results.png").stat().st_size > 1000


def test_a_text_that_the_memory_is_too_small_for_is_refused(trained, tmp_path, capsys, monkeypatch):
    run, _ = trained
    (tmp_path / "long.txt").write_text("x" * 5000)
    monkeypatch.setattr(command, "free_memory", lambda: Memory(2**27, None))
    options = ["--checkpoint", str(run), "--text", str(tmp_path / "long.txt")]
    assert main(["evaluate", *options, "--max_length", "64", "--stride", "63", "--json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", *options, "--max_length", "4096", "--json"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("orogen: EvaluateConfig.max_length is 4096; expected less: evaluation needs"), error
    assert "scores of attention" in error
    # One window fits, as many as are scored together do not.
    monkeypatch.setattr(command, "free_memory", lambda: Memory(2**22, None))
    assert main(["evaluate", *options, "--max_length", "256", "--json"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("orogen: EvaluateConfig.batch_tokens is 8192; expected less"), error


@pytest.mark.parametrize("raised", [ConfigError("too long"), KeyboardInterrupt()], ids=["bad input", "Ctrl-C"])
def test_what_is_known_is_kept_when_an_evaluation_ends_early(trained, tmp_path, capsys, monkeypatch, raised):
    run, text = trained
    out, later = tmp_path / "out", tmp_path / "later.txt"
    later.write_text("later")
    measure = run_module.measure_text

    def measure_text(subject, path):
        if path == str(later):
            raise raised
        return measure(subject, path)

    monkeypatch.setattr(run_module, "measure_text", measure_text)
    status = main(["evaluate", "--checkpoint", str(run), "--text", str(text), "--text", str(later), "--out", str(out)])
    assert status == (2 if isinstance(raised, ConfigError) else 130)
    kept = json.loads((out / "results.json").read_text())
    assert not kept["complete"] and kept["results"].keys() == {str(text)}
    assert kept["results"][str(text)]["tokens"] > 0


def test_text_is_generated_and_examples_are_exported(trained, tmp_path, capsys):
    run, _ = trained
    answer = evaluated(capsys, "--checkpoint", run, "--tasks", "document_qa", "--lengths", "400", "--samples", "2")
    assert answer["results"]["document_qa"].keys() == {"recall@400", "accuracy@400"}
    options = ("--tasks", "document_qa,mqar", "--lengths", "400", "--samples", "2", "--export", tmp_path / "made")
    files = [Path(file) for file in evaluated(capsys, "--checkpoint", run, *options)["files"]]
    assert [file.name for file in files] == ["document_qa_400.jsonl", "document_qa_400.yaml", "mqar_400.jsonl"]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) == 2 and all(line["target"] == f" {line['answers'][0]}" for line in lines)
    # Of a byte tokenizer: bos, then bytes from 3 on.
    assert bytes(i - 3 for i in lines[0]["ids"][1:]).decode() == lines[0]["prompt"] + lines[0]["target"]
    assert [lines[0]["ids"][place] - 3 for place in lines[0]["asked"]] == list(lines[0]["target"].encode())


def test_bad_input_is_one_line(trained, tmp_path, refused, monkeypatch):
    run, _ = trained
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    mqar = ("--tasks", "mqar")
    for options, message in (
        ((), "EvaluateConfig.tasks is (); expected at least one, or EvaluateConfig.texts"),
        (("--tasks", "mqar,mqar"), "EvaluateConfig.tasks is ('mqar', 'mqar'); expected each once"),
        (("--tasks", "hellaswag"), "lm_eval not installed; expected what `pip install 'orogen[eval]'` installs"),
        (
            (*mqar, "--lengths", "4"),
            "EvaluateConfig.lengths has 4, and the tokenizer 256 tokens to draw from; expected",
        ),
        (("--tasks", "phonebook", "--lengths", "64"), "EvaluateConfig.lengths has 64; expected at least"),
        (("--text", tmp_path / "empty.txt"), f"{str(tmp_path / 'empty.txt')!r} has no text"),
        (("--text", tmp_path / "none"), f"corpus {str(tmp_path / 'none')!r} does not exist"),
        (("--text", tmp_path / "empty.txt", "--samples", "3"), "EvaluateConfig.samples is 3; expected 100"),
        (("--text", run / "config.gin", "--max_length", "8", "--stride", "8"), "EvaluateConfig.stride is 8; expected"),
        ((*mqar, "--out", tmp_path / "file"), f"--out {str(tmp_path / 'file')!r} is a file"),
        ((*mqar, *bound("EvaluateConfig.every = 4")), "EvaluateConfig.every is 4; expected None"),
        ((*mqar, *bound("EvaluateConfig.tasks = ('copying',)")), "gin bindings: EvaluateConfig.tasks is bound twice"),
        (("--text", run / "config.gin", "--export", tmp_path / "out"), "--export with tasks () and texts"),
    ):
        line = refused("evaluate", "--checkpoint", run, *options)
        assert line.startswith(message), line


def test_what_a_run_cannot_evaluate_is_refused(tmp_path, refused):
    recipe = write_recipe(tmp_path)
    assert set(SUITES) >= {"mqar", "needle"}
    sizes = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "chunk_size")
    mamba = ["ModelConfig.pattern = 'M*-'", *(f"ModelConfig.{size} = 4" for size in sizes)]
    for bindings, message in (
        (("EvaluateConfig.tasks = ('mqar',)", "EvaluateConfig.every = 3", "TrainConfig.evaluate_every = 2"),
         "EvaluateConfig.every is 3; expected a multiple of TrainConfig.evaluate_every = 2"),
        (("EvaluateConfig.tasks = ('mqar',)", "DataConfig.heldout_fraction = 0.0"),
         "DataConfig.heldout_fraction is 0.0; expected above 0 with EvaluateConfig"),
        (("EvaluateConfig.tasks = ('needle',)", "PlanConfig.stage = 2", "PlanConfig.microbatches = 2"),
         "PlanConfig.stage is 2; expected 1: an engine has no pipeline"),
        (("EvaluateConfig.tasks = ('needle',)", "PlanConfig.context = 2"),
         "PlanConfig.context_attention is 'ring'; expected allgather in an engine"),
        (("EvaluateConfig.tasks = ('needle',)", "PlanConfig.context = 2", "PlanConfig.context_attention = 'allgather'",
          "PlanConfig.context_ssm = 'heads'", *mamba),
         "PlanConfig.context_ssm is 'heads'; expected state in an engine"),
    ):  # fmt: skip
        line = refused("train", "--gin_file", recipe, "--run", tmp_path / "run", *bound(*bindings))
        assert line.startswith(message), line


@pytest.mark.parametrize(
    ("pattern", "plan"),
    [
        ("M*", {"data": 2, "context": 3, "context_attention": "allgather"}),
        ("M-", {"context": 3, "tensor": 2}),  # whose context_attention nothing reads, so that a run may not bind it
        ("*-", {"context": 2, "tensor": 3, "context_attention": "allgather", "context_ssm": "heads"}),
    ],
)
def test_a_runs_tasks_generate_over_its_context(pattern, plan):
    """Slots are a multiple of its ranks."""
    run = run_config(hybrid(pattern=pattern, mtp_depths=0), plan=plan)
    engine = _engine(run)
    sizes = sizes_of(run.model, run.plan, engine)
    assert sizes.slots * sizes.ranks == engine.slots >= SLOTS and engine.slots % run.plan.devices == 0


def test_a_run_without_held_out_text_is_not_evaluated_on_tasks():
    task: Any = with_tasks(dataclasses.replace(PRETRAINING, evaluation=lambda *parts: None))
    with pytest.raises(ConfigError, match="expected a split with some"):
        task.evaluation(None, None, None)
