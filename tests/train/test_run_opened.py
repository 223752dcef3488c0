"""What is opened of a run folder: damaged parts are refused, and what it generates is held to its budget."""

import dataclasses
import json
import re
import shutil

import pytest
from tests.train.runs import STEPS, run

from orogen.checkpoint import checksums
from orogen.checkpoint.open import open_model
from orogen.config.checks import ConfigError
from orogen.config.plan import FOR_GPU
from orogen.infer.generate import generate


def test_a_checkpoint_of_another_model_is_refused(recipe, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    text = (
        (folder / "config.gin")
        .read_text()
        .replace("ModelConfig.moe_intermediate_size = 12", "ModelConfig.moe_intermediate_size = 16")
    )
    (folder / "config.gin").write_text(text)
    with pytest.raises(ConfigError, match="is of another model"):
        open_model(folder)


def test_inference_leaves_the_kernels_and_buffers_of_training(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    changes = {
        **{f"PlanConfig.{field}": kernel for field, kernel in FOR_GPU.items()},
        "PlanConfig.dispatch": "ragged", "PlanConfig.buffer_factor": 0.5, "PlanConfig.capacity_factor": 0.5,
        "TrainConfig.compute_dtype": "bfloat16",
    }  # fmt: skip
    text = (folder / "config.gin").read_text()
    for name, value in changes.items():
        text, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert found == 1, name
    (folder / "config.gin").write_text(text)
    assert generate(open_model(folder), ["d"], tokens=5) == generate(open_model(whole), ["d"], tokens=5)


@pytest.mark.parametrize("damage", ["_METADATA", "manifest.ocdbt", "d", "data", "model"])
@pytest.mark.parametrize("read", ["resume", "open_model"])
def test_a_damaged_checkpoint_is_refused_in_one_line(recipe, whole, tmp_path, damage, read):
    """Truncated files, or a missing item."""
    if (damage, read) == ("data", "open_model"):
        return  # it reads only the model
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoints" / str(STEPS)
    if damage in ("data", "model"):
        shutil.rmtree(newest / damage)
    else:
        found = [p for p in (newest / "model").rglob("*") if p.is_file() and damage in (p.name, p.parent.name)]
        assert found
        for path in found:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError) as caught:
        run(recipe, folder, "TrainConfig.steps=25", resume=True) if read == "resume" else open_model(folder)
    assert str(newest) in str(caught.value) and "\n" not in str(caught.value)


def test_generation_is_greedy_at_zero_temperature_and_stays_inside_its_budget(whole):
    loaded = open_model(whole)
    first, again = (generate(loaded, ["document 1"], tokens=9, temperature=0.0, seed=s)[0] for s in (0, 1))
    assert first == again
    assert len(first.encode()) <= 9 * 4


def test_prompts_of_unequal_lengths_do_not_disturb_each_other(whole):
    loaded = open_model(whole)
    both = generate(loaded, ["document 1", "d"], tokens=6, temperature=0.0)
    assert both == [generate(loaded, [p], tokens=6, temperature=0.0)[0] for p in ("document 1", "d")]


@pytest.mark.parametrize("tokens", [2**20, 10**12, 10**30])
def test_more_tokens_than_anyone_can_wait_for_are_refused(whole, tokens):
    with pytest.raises(ConfigError, match=rf"a prompt of 2 tokens and {tokens} new ones; expected at most 1048576"):
        generate(open_model(whole), ["d"], tokens=tokens)


def test_a_tokenizer_larger_than_the_model_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["ab"] = 300
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="tokenizer.json is damaged"):
        open_model(folder)
    # As an earlier release saved it, without checksums of the tokenizer.
    for step in (folder / "checkpoints").iterdir():
        (step / checksums.NAME).unlink()
        for item in ("layout", "about"):
            shutil.rmtree(step / item)
        (step / "commit_success.txt").touch()
    with pytest.raises(ConfigError, match="ModelConfig.vocab_size is 259; expected at least 301, the size of the"):
        open_model(folder)


def test_generation_past_the_learned_positions_is_refused(whole):
    loaded = open_model(whole)
    short = loaded._replace(config=dataclasses.replace(loaded.config, learned_positions=8))
    with pytest.raises(ConfigError, match=r"a prompt of \d+ tokens and 6 new ones; expected at most .* = 8"):
        generate(short, ["document 1"], tokens=6)
