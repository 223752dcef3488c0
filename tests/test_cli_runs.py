"""The command line on run folders: data, devices and folders that it refuses, runs that were killed, and generation."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import bound, write_recipe

from orogen.cli import main


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path)


# Refusals of data, devices and run folders


@pytest.fixture
def train(refused, recipe, tmp_path) -> Callable[..., str]:
    """Refuses `orogen train` of the recipe in `folder` with `bindings`."""

    def run(*bindings: str, folder: str = "run", resume: bool = False) -> str:
        more = ["--resume"] if resume else []
        return refused("train", "--gin_file", recipe, "--run", tmp_path / folder, *more, *bound(*bindings))

    return run


def test_missing_corpus(train, tmp_path):
    missing = str(tmp_path / "none")
    assert train(f"DataConfig.corpus = {missing!r}") == (
        f"corpus {missing!r} does not exist: expected 'stdlib', a file or a folder"
    )


def test_corpus_without_a_file(train, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    message = train(f"DataConfig.corpus = {str(empty)!r}")
    assert message.startswith(f"corpus {str(empty)!r} has no file to read: expected .txt")


def test_corpus_of_empty_files(train, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for number in range(3):
        (empty / f"{number}.txt").touch()
    message = train(f"DataConfig.corpus = {str(empty)!r}")
    assert message == f"corpus {str(empty)!r} has 3 documents and no text: expected at least one with text"


def test_corpus_that_is_no_text(train, tmp_path):
    file = tmp_path / "binary.txt"
    file.write_bytes(b"abc\xff")
    assert train(f"DataConfig.corpus = {str(file)!r}") == f"{file}: byte 3 is not UTF-8: expected UTF-8 text"


def test_missing_tokenizer(train, tmp_path):
    missing = str(tmp_path / "tokenizer.json")
    assert train(f"DataConfig.tokenizer = {missing!r}") == (
        f"tokenizer {missing!r} not found: expected 'byte', 'bpe' or a tokenizer.json"
    )


def test_vocabulary_of_the_model_is_the_tokenizers(train):
    assert train("ModelConfig.vocab_size = 200") == "ModelConfig.vocab_size = 200: expected 259, the tokenizer's"


def test_vocabulary_too_small_for_bytes(train):
    message = train("DataConfig.tokenizer = 'bpe'", "DataConfig.vocab_size = 100")
    assert message.startswith("DataConfig.vocab_size is 100; expected at least 259")


def test_vocabulary_that_the_corpus_cannot_fill(train):
    bindings = ("DataConfig.tokenizer = 'bpe'", "DataConfig.vocab_size = 5000", "ModelConfig.vocab_size = 5000")
    assert train(*bindings).startswith("DataConfig.vocab_size = 5000: expected at most ")


def test_more_devices_than_exist(train):
    assert train("PlanConfig.data = 16", "TrainConfig.batch_size = 16") == (
        "PlanConfig asks for 16 devices (data 16); expected at most the 8 that exist (--fake_devices 16 simulates them)"
    )


def test_run_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "run").write_text("precious")
    expected = f"run folder {str(tmp_path / 'run')!r} is a file; expected a folder or a new name"
    assert train() == train(resume=True) == expected


def test_run_folder_below_a_file(train, tmp_path):
    (tmp_path / "run").write_text("precious")
    assert "Not a directory" in train(folder="run/below")


def test_folder_that_is_no_run_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    expected = f"run folder {str(tmp_path / 'run')!r} is not empty and has no config.gin; expected a new folder"
    assert train() == train(resume=True) == expected


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_killed_in_its_first_compilation_starts_again(recipe, tmp_path, monkeypatch, resume):
    from orogen.train import loop

    class Killed(BaseException):
        """What no handler takes."""

    def killed(*_):
        raise Killed

    command = ["train", "--gin_file", str(recipe), "--run", str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.Loop, "start", killed)
        main(command)
    assert not (tmp_path / "run" / "config.gin").exists()
    assert main([*command, *(["--resume"] if resume else [])]) == 0


def test_sigterm_before_the_first_step_stops_without_taking_one(recipe, tmp_path, monkeypatch, capsys):
    from orogen.train import loop

    command = ["train", "--gin_file", str(recipe), "--run", str(tmp_path / "run"), "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch_to_devices", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"finished": False}
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_a_report_of_an_earlier_step_does_not_stay(recipe, tmp_path, monkeypatch, capsys):
    """Killed after a prolonged run's last step, and before its report."""
    command = ["train", "--gin_file", str(recipe), "--run", str(tmp_path / "run"), "--json", "--resume"]
    assert main(command) == 0

    class Killed(BaseException):
        """What no handler takes."""

    def killed(*_):
        raise Killed

    longer = [*command, *bound("TrainConfig.steps = 3")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("orogen.evaluate.summary.summarise", killed)
        main(longer)
    capsys.readouterr()
    assert main(longer) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0  # the summary of a new report


@pytest.fixture
def saved(recipe, tmp_path) -> Path:
    """A folder with this recipe's config, as a run that stopped early leaves it."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.gin").write_text(recipe.read_text())
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_run_folder_of_another_config(train, saved):
    expected = (
        f"run folder {str(saved)!r} has another config: ModelConfig.intermediate_size is 14 there and 28 here; "
        "expected an equal one"
    )
    binding = "ModelConfig.intermediate_size = 28"
    assert train(binding) == train(binding, resume=True) == expected


@pytest.mark.parametrize(
    "binding",
    [
        "DataConfig.seed = 7",
        "TrainConfig.seed = 7",
        "TrainConfig.batch_size = 8",
        "TrainConfig.sequence_length = 48",
        "OptimizerConfig.learning_rate = 2e-3",
        "DataConfig.heldout_fraction = 0.4",
    ],
)
def test_a_run_does_not_go_on_with_other_settings(train, saved, binding):
    field = binding.split(" = ")[0]
    assert train(binding, resume=True).startswith(f"run folder {str(saved)!r} has another config: {field} is ")


def test_a_run_goes_on_only_with_resume(train, saved):
    assert train() == f"run folder {str(saved)!r} holds a run; expected --resume or another folder"
    assert train("TrainConfig.steps = 5").endswith("expected --resume or another folder")  # a run may be prolonged


def test_run_folder_with_a_broken_config(train, saved):
    (saved / "config.gin").write_text("neither binding nor include\n")
    assert train(resume=True).startswith(f"{saved / 'config.gin'}: ")


# Generate


def test_generate_from_a_folder_that_is_no_run(refused, tmp_path, recipe):
    for folder in (tmp_path / "none", tmp_path / "corpus", recipe):
        message = f"checkpoint {str(folder)!r} has no config.gin and no config.json; expected a run folder, "
        message += "an Orogen checkpoint folder or a Hugging Face folder"
        assert refused("generate", "--checkpoint", folder) == message


def test_generate_from_a_run_that_saved_nothing(refused, saved):
    message = f"{saved / 'checkpoints'} holds no complete checkpoint; expected at least one"
    assert refused("generate", "--checkpoint", saved) == message


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--temperature", "-1", "0 or more"),
        ("--temperature", "nan", "0 or more"),
        ("--temperature", "inf", "0 or more"),
        ("--top_p", "0", "above 0 up to 1"),
        ("--top_p", "1.1", "above 0 up to 1"),
        ("--min_p", "2", "from 0 to 1"),
        ("--presence_penalty", "3", "from -2 to 2"),
    ],
)
def test_generate_refuses_odds_that_are_none(refused, saved, option, value, expected):
    message = refused("generate", "--checkpoint", saved, option, value)
    assert message == f"{option} is {float(value)}; expected {expected}"


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_generate_refuses_a_seed_out_of_range(refused, saved, seed):
    message = refused("generate", "--checkpoint", saved, "--seed", seed)
    assert message == f"--seed is {seed}; expected a whole number from 0 to 2**63 - 1"


def test_generate_refuses_a_prompt_that_is_no_text(refused, saved):
    message = refused("generate", "--checkpoint", saved, "--prompt", b"\xff".decode(errors="surrogateescape"))
    assert message == "--prompt '\\udcff'; expected valid UTF-8"
