"""A captioner from images to captions: trained under a plan, resumed, and answering by its database alone.

Images are squares of one colour; the encoder is the tiny random CLIP of the fixtures.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orogen.cli import main
from orogen.config.load import load
from orogen.vision.captioning import make_captioning
from orogen.vision.corpus import FIRST

ENCODER = Path(__file__).parent.parent / "fixtures" / "vision" / "clip"
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 30), "blue": (20, 40, 240), "grey": (128, 128, 128)}
RECIPE = """
ModelConfig.pattern = 'x*g-'
ModelConfig.vocab_size = 259
ModelConfig.hidden_size = 32
ModelConfig.num_attention_heads = 4
ModelConfig.num_key_value_heads = 2
ModelConfig.head_dim = 8
ModelConfig.rope_theta = 10000.0
ModelConfig.intermediate_size = 48
ModelConfig.image_feature_size = 24
ModelConfig.image_features = 10
ModelConfig.resampler_latents = 3
ModelConfig.resampler_layers = 1
DataConfig.corpus = {corpus!r}
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.2
DataConfig.tuning_fraction = 0.0
TrainConfig.steps = {steps}
TrainConfig.batch_size = 4
TrainConfig.sequence_length = 56
TrainConfig.seed = 0
TrainConfig.evaluate_every = 40
TrainConfig.evaluate_rows = 4
TrainConfig.ngram_order = 0
TrainConfig.sample_tokens = 1
OptimizerConfig.learning_rate = 1e-2
OptimizerConfig.schedule = 'constant'
VisionConfig.encoder = {encoder!r}
VisionConfig.features = {features!r}
VisionConfig.images_per_row = 4
"""


def picture(name, seed):
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (16, 20, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty-four pictures with captions, and a broken one."""
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        picture(name, number).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"a {name} square"}))
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    lines.append(json.dumps({"image": "broken.png", "caption": "a broken square"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder


def recipe(folder, target, *bindings, steps):
    text = RECIPE.format(
        corpus=str(folder / "pairs.jsonl"), encoder=str(ENCODER), features=str(folder / "features"), steps=steps
    )
    target.write_text("\n".join([text, *bindings]))
    return target


@pytest.fixture(scope="module")
def run(folder):
    """A trained captioner."""
    file = recipe(folder, folder / "recipe.gin", "PlanConfig.data = 2", "PlanConfig.tensor = 2", steps=80)
    assert main(["train", "--gin_file", str(file), "--run", str(folder / "run"), "--json"]) == 0
    return folder / "run"


def test_it_learns_what_it_sees(folder, run, capsys, tmp_path):
    images = []
    for name in ("blue", "green", "red"):
        picture(name, 99).save(tmp_path / f"{name}.png")
        images += ["--image", str(tmp_path / f"{name}.png")]
    assert main(["caption", "--checkpoint", str(run), *images, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["caption"] for one in facts["captions"]] == ["a blue square", "a green square", "a red square"]
    described = json.loads((run / "env.json").read_text())["data"]
    assert (described["documents"], described["images"], described["broken"]) == (24, 24, 1)
