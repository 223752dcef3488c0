"""The mean of checkpoints of any kind, against numpy on the numbers of the files."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.checkpoint.test_open import save_run
from tests.convert.synthetic import short_nemotron_h, write

from orogen.checkpoint import checksums
from orogen.checkpoint.open import open_model
from orogen.checkpoint.transfer import from_hf
from orogen.cli import main
from orogen.config.data import DataConfig
from orogen.config.plan import PlanConfig
from orogen.data.vocabulary import make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Orogen folders of one model with other numbers, and a run that has the second one's as step 3."""
    root = tmp_path_factory.mktemp("folders")
    write(root / "hf", *short_nemotron_h(95), "float32")
    from_hf(root / "hf", root / "one")
    shutil.copytree(root / "one", root / "two")
    rng = np.random.default_rng(0)
    one = load_file(root / "one" / "model.safetensors")
    save_file({k: rng.normal(size=v.shape).astype(v.dtype) for k, v in one.items()}, root / "two" / "model.safetensors")
    (root / "two" / checksums.NAME).unlink()
    checksums.write(root / "two")
    save_run(root / "run", root / "two", PlanConfig())
    return root


@pytest.mark.parametrize(("second", "weights"), [("two", None), ("run/checkpoints/3", "1,3")])
def test_the_mean_is_that_of_the_files(folders, tmp_path, second, weights):
    more = [] if weights is None else ["--weights", weights]
    sources = [str(folders / "one"), str(folders / second)]
    assert main(["average", *sources, "--out", str(tmp_path / "mean"), *more]) == 0
    one, two = (load_file(folders / name / "model.safetensors") for name in ("one", "two"))
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean.keys() == one.keys()
    a, b = (0.5, 0.5) if weights is None else (0.25, 0.75)
    for name, array in mean.items():
        wanted = (a * one[name].astype(np.float64) + b * two[name].astype(np.float64)).astype(np.float32)
        assert array.dtype == np.float32 and np.array_equal(array, wanted), name
    assert open_model(tmp_path / "mean").config == open_model(folders / "one").config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one", "two", "--weights", "1,2,3"], "3 weights for 2 checkpoints; expected one for each"),
        (
            ["one", "two", "--weights", "0,0"],
            "the weights are [0.0, 0.0]; expected non-negative numbers, at least one",
        ),
        (["one", "two", "--weights", "1e308,1e308"], "with a finite sum"),
        (["one", "run/checkpoints/4"], "holds no complete checkpoint; expected at least one"),
        (["one", "none"], "expected a run folder, an Orogen checkpoint folder or a Hugging Face folder"),
        (["one", "other"], "ModelConfig.chunk_size of"),
    ],
)
def test_what_has_no_mean_is_refused_and_leaves_nothing(folders, tmp_path, capsys, arguments, message):
    if not (folders / "other").exists():
        shutil.copytree(folders / "one", folders / "other")
        text = (folders / "other" / "config.gin").read_text().splitlines()
        text = ["ModelConfig.chunk_size = 3" if line.startswith("ModelConfig.chunk_size") else line for line in text]
        (folders / "other" / "config.gin").write_text("\n".join(text))
    paths = [str(folders / one) if one[0].isalpha() else one for one in arguments]
    assert main(["average", *paths, "--out", str(tmp_path / "mean")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "mean").exists()


def test_models_of_other_tokenizers_have_no_mean(folders, tmp_path, capsys):
    for name, text in (("a", "ab" * 9), ("b", "cd" * 9)):
        shutil.copytree(folders / "one", tmp_path / name)
        config = DataConfig(corpus="unread", tokenizer="bpe", vocab_size=260)
        make_tokenizer(config, [text]).save(tmp_path / name / "tokenizer")
    command = ["average", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "mean")]
    assert main(command) == 2
    assert "b' has a tokenizer of its own; expected that of" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_an_existing_folder_is_refused_before_anything_is_read(folders, tmp_path, capsys):
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "mine").touch()
    assert main(["average", "no such folder", str(folders / "one"), "--out", str(tmp_path / "mean")]) == 2
    assert "exists; expected a new folder" in capsys.readouterr().err and (tmp_path / "mean" / "mine").exists()
