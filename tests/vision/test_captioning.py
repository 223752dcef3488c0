"""A captioner from images to captions: trained under a plan, resumed, and answering by its database alone.

Images are squares of one colour; the encoder is the tiny random CLIP of the fixtures.
"""

import dataclasses
import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orogen.checkpoint.open import open_folder
from orogen.cli import main
from orogen.compress.rewrite import Source
from orogen.config.checks import ConfigError
from orogen.config.text import model_text
from orogen.data.vocabulary import byte_tokenizer
from orogen.vision import features
from orogen.vision import run as vision_run
from orogen.vision.answers import Sight
from orogen.vision.database import unit
from orogen.vision.encoder import open_encoder
from orogen.vision.examples import FIRST
from orogen.vision.tower import Encoded

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
    file = recipe(folder, folder / "recipe.gin", "PlanConfig.data = 2", "PlanConfig.tensor = 2", steps=60)
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


def captioned(capsys, run, *options):
    assert main(["caption", "--checkpoint", str(run), "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def database(folder, tmp_path, capsys):
    """The pairs as a database."""
    assert main(["database", "build", str(tmp_path / "db"), "--input", str(folder / "pairs.jsonl"), "--encoder",
                 str(ENCODER), "--json"]) == 0  # fmt: skip
    facts = json.loads(capsys.readouterr().out)
    assert facts["entries"] == 24 and list(facts["left_out"]) == ["pairs.jsonl:25"]
    return tmp_path / "db"


def test_what_is_retrieved_changes_with_the_database_alone(run, database, tmp_path, capsys):
    picture("grey", 7).save(tmp_path / "grey.png")
    ask = ("--database", database, "--retrieved", 1, "--image", tmp_path / "grey.png")
    (before,) = captioned(capsys, run, *ask)["captions"]
    assert before["retrieved"][0]["caption"] != "a grey square"
    (tmp_path / "new.jsonl").write_text(json.dumps({"image": "grey.png", "caption": "a grey square"}))
    assert main(["database", "add", str(database), "--input", str(tmp_path / "new.jsonl"), "--encoder",
                 str(ENCODER)]) == 0  # fmt: skip
    capsys.readouterr()
    (after,) = captioned(capsys, run, *ask)["captions"]
    assert after["retrieved"][0]["caption"] == "a grey square" and after["retrieved"][0]["score"] > 0.999
    (guarded,) = captioned(capsys, run, *ask, "--guard", "0.9999")["captions"]
    assert guarded["retrieved"] == before["retrieved"]
    assert main(["database", "remove", str(database), "--ids", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 24


def test_retrieval_that_finds_nothing_is_told(folder, run, database, capsys):
    ask = ("--database", database, "--retrieved", 1, "--image", folder / "0.png")
    assert captioned(capsys, run, *ask)["without_retrieved"] == 0
    assert captioned(capsys, run, *ask, "--guard", "-1")["without_retrieved"] == 1
    assert captioned(capsys, run, *ask[:2], "--retrieved", 0, *ask[4:])["without_retrieved"] == 0
    assert main(["database", "remove", str(database), "--ids", ",".join(map(str, range(24)))]) == 0
    assert main(["caption", "--checkpoint", str(run), *map(str, ask)]) == 0
    assert "nothing was retrieved for 1 of 1 images" in capsys.readouterr().out


def test_a_corpus_is_scored_and_shown_on_a_page(folder, run, tmp_path, capsys):
    page = tmp_path / "page.html"
    facts = captioned(capsys, run, "--input", folder / "pairs.jsonl", "--page", page)
    assert len(facts["captions"]) == 24 and list(facts["broken"]) == ["pairs.jsonl:25"]
    assert facts["scores"]["bleu_1"] > 0.9 and facts["scores"]["cider"] > 5
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 24 and "a blue square" in text and "left out: pairs.jsonl:25" in text


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--image", "{folder}/broken.png"], "cannot be decoded"),
        (["--image", "{folder}/0.png", "--retrieved", "1"], "expected --database, or --retrieved 0"),
        (["--image", "{folder}/0.png", "--encoder", "{other}"], "with which the model was trained"),
        ([], "both or neither of --image and --input"),
    ],
)
def test_what_cannot_be_captioned_is_refused(folder, run, capsys, options, expected):
    words = [word.format(folder=folder, other=ENCODER.parent / "siglip") for word in options]
    assert main(["caption", "--checkpoint", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_an_image_alone_asks_for_its_caption(folder, run, database, tmp_path, capsys):
    picture("blue", 99).save(tmp_path / "blue.png")
    words = ["generate", "--checkpoint", str(run), "--image", str(tmp_path / "blue.png"), "--json"]
    assert main([*words, "--temperature", "0"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["text"], facts["finish"], facts["retrieved"]) == ("a blue square", "stop", [])
    assert main([*words, "--tokens", "6", "--database", str(database), "--retrieved", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["finish"] == "length" and [hit["caption"] for hit in facts["retrieved"]] == ["a blue square"] * 2


def test_what_is_said_stands_as_in_training(folder, run, database, monkeypatch):
    prompts, words = [], byte_tokenizer()
    answered = words.encode_inside("a").tolist()
    monkeypatch.setattr("orogen.vision.describe.Captioner.continued", lambda _, x: prompts.extend(x) or [answered])
    images = [(folder / f"{number}.png").read_bytes() for number in (0, 2)]
    seen = Sight(run, database, 1)(["see", images[0], images[1], "a"], 64)
    told = [words.encode_inside(text).tolist() for text in ("see\n", "a red square\n", "a blue square\n", "a")]
    assert prompts[0].ids == [words.bos_id, *told[0], FIRST, *told[1], FIRST + 1, *told[2], *told[3]]
    (alone,) = open_encoder(ENCODER).encode([Image.open(folder / "2.png").convert("RGB")]).features_bpd
    np.testing.assert_allclose(prompts[0].features[1], alone, atol=1e-4)
    assert (seen.text, seen.prompt, seen.tokens, seen.ended) == ("a", len(prompts[0].ids), 2, True)
    assert [(hit["image"], hit["caption"]) for hit in seen.retrieved] == [(0, "a red square"), (1, "a blue square")]


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--image", "{folder}/broken.png"], "image 0: it cannot be decoded"),
        (["--image", "{folder}/0.png", "--tokens", "1025"], "max_tokens is 1025; expected 1 to 1024 beside images"),
        (["--image", "{folder}/0.png", "--retrieved", "1"], "expected --database, or --retrieved 0"),
        (["--image", "{folder}/0.png", "--chat"], "expected --image with --prompt alone"),
        (["--image", "{folder}/0.png", "--out", "x"], "--image with --out; expected --image with --prompt alone"),
        (["--image", "{folder}/0.png", "--chat_template", "x"], "--image with --chat_template; expected"),
        (["--image", "{folder}/0.png", "--temperature", "0.5"], "--temperature 0.5; expected none with --image"),
        (["--image", "{folder}/0.png", "--stop", "a"], "--stop ['a']; expected none with --image"),
        (["--image", "{folder}/0.png", "--regex", "a"], "--regex a; expected none with --image"),
        (["--prompt", "a", "--retrieved", "1"], "expected them with --image alone"),
    ],
)
def test_what_cannot_be_seen_is_refused(folder, run, capsys, options, expected):
    assert main(["generate", "--checkpoint", str(run), *(word.format(folder=folder) for word in options)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--retrieved", "1"], "expected --database, or --retrieved 0"),
        (["--retrieved", "1", "--database", "{folder}"], "{folder}"),
    ],
)
def test_a_server_s_database_is_checked_before_an_engine_is_made(folder, run, capsys, monkeypatch, options, expected):
    monkeypatch.setattr("orogen.infer.command.serve", lambda *_: pytest.fail("the engine was asked for"))
    assert main(["serve", "--checkpoint", str(run), *(word.format(folder=folder) for word in options)]) == 2
    error = capsys.readouterr().err
    assert expected.format(folder=folder) in error and error.count("\n") == 1


def test_a_server_without_the_database_of_its_model_refuses_images(run, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("orogen.infer.command.serve", lambda _, sight: given.append(sight()) or 0)
    facts = json.loads((run / "vision.json").read_text())
    (tmp_path / "vision.json").write_text(json.dumps(facts | {"retrieved": 2}))
    assert main(["serve", "--checkpoint", str(tmp_path)]) == 0
    with pytest.raises(ConfigError, match="a message has an image; expected texts alone: .* 2 retrieved captions, and"):
        given[0]([b"x"], 4)
    assert main(["serve", "--checkpoint", str(run)]) == 0 and isinstance(given[1], Sight)


def test_documents_that_are_no_pairs_are_counted(tmp_path):
    (tmp_path / "0.png").write_bytes(b"image")
    lines = [{"image": "0.png", "caption": "a red square"}, {"images": [None], "texts": ["alone"]}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    broken = {}
    assert list(vision_run._pairs(tmp_path, broken)) == [("mixed.jsonl:1", b"image", "a red square")]
    assert broken == {"mixed.jsonl:2": "it is not one image and one caption"}


def test_a_file_that_is_too_large_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("orogen.data.interleaved.MAX_BYTES", 200)
    monkeypatch.setattr("orogen.vision.transforms.MAX_BYTES", 200)
    Image.new("RGB", (2, 2)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"image" * 100)
    lines = [json.dumps({"image": f"{number}.png", "caption": "a square"}) for number in (1, 0)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    encoder = types.SimpleNamespace(transform=lambda image: image, encode_pixels=lambda pixels: None)
    broken = {}
    (part,) = vision_run._parts(vision_run._pairs(tmp_path, broken), encoder, broken)
    assert part.names == ["pairs.jsonl:2"]
    assert broken == {"pairs.jsonl:1": "the file is too large; expected at most 200 bytes"}


@pytest.mark.parametrize("guard", ["nan", "1.5", "x"])
def test_a_guard_is_a_cosine(guard, capsys):
    with pytest.raises(SystemExit):
        main(["caption", "--checkpoint", "nowhere", "--image", "0.png", "--guard", guard])
    assert f"{guard!r}; expected a cosine, from -1 to 1" in capsys.readouterr().err


def test_examples_come_before_an_image(folder, run, tmp_path, capsys, monkeypatch):
    prompts = []
    monkeypatch.setattr("orogen.vision.describe.Captioner.captions", lambda _, asked: prompts.extend(asked) or ["it"])
    words = ["--image", folder / "4.png", "--shots", 2, "--examples", folder / "pairs.jsonl", "--features", tmp_path]
    (one,) = captioned(capsys, run, *words, "--guard", "0.99997", "--page", tmp_path / "page.html")["captions"]
    assert one["examples"] == ["a green square"] * 2
    assert "example: a green square" in (tmp_path / "page.html").read_text()
    (asked,) = prompts
    text = byte_tokenizer().encode_inside("a green square\n").tolist()
    assert asked.ids[1:] == [FIRST + 1, *text, FIRST + 2, *text, FIRST] and sorted(asked.features) == [0, 1, 2]
    encoder = open_encoder(ENCODER)
    near = [encoder.encode([picture("green", n)]) for n in range(1, 24, 3)]
    cosines = [float((unit(one.embedding_be) @ unit(near[1].embedding_be).T)[0, 0]) for one in near]
    second, first = sorted((n for n, cosine in enumerate(cosines) if cosine < 0.99997), key=cosines.__getitem__)[-2:]
    np.testing.assert_allclose(asked.features[1], near[second].features_bpd[0], atol=1e-4)
    np.testing.assert_allclose(asked.features[2], near[first].features_bpd[0], atol=1e-4)  # next to the image
    assert list(tmp_path.glob("*/features.npy"))


def test_a_model_trained_with_examples_needs_some(folder, run, tmp_path, capsys):
    facts = json.loads((run / "vision.json").read_text())
    (tmp_path / "vision.json").write_text(json.dumps({**facts, "shots": 2}))
    assert main(["caption", "--checkpoint", str(tmp_path), "--image", str(folder / "0.png")]) == 2
    assert "the captions have 2 examples each; expected --examples, or --shots 0" in capsys.readouterr().err


def test_a_database_is_refused_before_images_are_encoded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("orogen.vision.run.read_entries", lambda *_: pytest.fail("encoded"))
    words = ["database", "build", str(folder), "--input", str(folder / "pairs.jsonl"), "--encoder", str(ENCODER)]
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "faiss", None)
    words[2] = str(tmp_path / "new")
    assert main([*words, "--index", "hnsw"]) == 2
    assert "faiss is not installed" in capsys.readouterr().err


def test_a_killed_process_does_not_stand_in_the_way(tmp_path):
    """A container that starts again has the same process ids."""
    shape = types.SimpleNamespace(shape=(2, 3), dimension=4)
    shape.encode_pixels = lambda _: Encoded(np.zeros((0, 2, 3)), np.zeros((0, 4)))
    (tmp_path / f"kept.{os.getpid()}").mkdir()
    features._encode([], shape, tmp_path / "kept")
    assert (tmp_path / "kept" / "features.npy").is_file()


def test_a_model_that_does_not_fit_its_encoder_is_refused(folder, tmp_path, capsys):
    file = recipe(folder, tmp_path / "r.gin", steps=1)
    words = ["train", "--gin_file", str(file), "--run", str(tmp_path / "run")]
    for binding, expected in (
        ("ModelConfig.image_features=11", "ModelConfig.image_features is 11; expected 10"),
        ("VisionConfig.image_token='<image>'", "expected one special token"),
    ):
        assert main([*words, "--gin_bindings", binding]) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_grafted_model_computes_what_it_did(tmp_path, capsys):
    source = Path(__file__).parent.parent / "fixtures" / "models" / "nemotron_h_dense"
    with open_folder(source) as folder:
        old = folder.config
    pattern = old.pattern.replace("-", "xg-", 1)
    new = dataclasses.replace(
        old,
        pattern=pattern,
        image_feature_size=5,
        image_features=3,
        resampler_latents=2,
        resampler_layers=1,
        retrieved_captions=2,
        caption_tokens=4,
    )
    (tmp_path / "new.gin").write_text(model_text(new))
    shutil.copytree(source, tmp_path / "old")
    assert main(["graft", "--checkpoint", str(tmp_path / "old"), "--gin_file", str(tmp_path / "new.gin"), "--out",
                 str(tmp_path / "grafted"), "--json"]) == 0  # fmt: skip
    with open_folder(tmp_path / "old") as before, open_folder(tmp_path / "grafted") as after:
        assert after.config == new
        old_source, new_source = Source(before), Source(after)
        fresh = new.pattern.index("x")
        numbers = [n for n in range(len(new_source.homes)) if n not in (fresh, fresh + 1)]
        for number, there in enumerate(numbers):  # what it computed, since closed gates leave the stream as it is
            mine, its = old_source.layer(number).arrays(), new_source.layer(there).arrays()
            assert mine.keys() == its.keys() and all(np.array_equal(mine[name], its[name]) for name in mine)
        for number in (fresh, fresh + 1):
            arrays = new_source.layer(number).arrays()
            assert not arrays["mixer", "tanh_gate"].any()
            (out,) = (array for name, array in arrays.items() if name[-1] in ("out", "down"))
            np.testing.assert_allclose(out.std(), new.output_init_std, rtol=0.1)
        others = [path for path in old_source.specs if path[0] not in ("backbone", "mtp")]
        assert all(np.array_equal(old_source.read(path), new_source.read(path)) for path in others)
    (tmp_path / "bad.gin").write_text(model_text(dataclasses.replace(new, pattern=pattern + "-")))
    capsys.readouterr()
    assert main(["graft", "--checkpoint", str(tmp_path / "old"), "--gin_file", str(tmp_path / "bad.gin"), "--out",
                 str(tmp_path / "no")]) == 2  # fmt: skip
    assert "with x, and g if wanted, inserted" in capsys.readouterr().err
