"""CLIP's and SigLIP's vision models and image transforms against transformers 5.23 (fixtures/vision: random weights),
and images that are no images.

Letters: y x rows and columns of pixels, c colours.
"""

import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from orogen.config.checks import ConfigError
from orogen.vision import transforms
from orogen.vision.encoder import BATCH, open_encoder
from orogen.vision.transforms import ImageError, decode, read_transform

FIXTURES = Path(__file__).parent.parent / "fixtures" / "vision"
NAMES = ("clip", "siglip")


@pytest.fixture(scope="module", params=NAMES)
def both(request):
    """An encoder, its folder, and what transformers computes."""
    folder = FIXTURES / request.param
    return open_encoder(folder), folder, dict(np.load(folder / "ref.npz"))


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(expected)


def test_features_and_embeddings_are_those_of_transformers(both):
    encoder, folder, reference = both
    made = encoder.encode([decode((folder / "image.png").read_bytes())])
    close(made.features_bpd, reference["features"])
    close(made.embedding_be, reference["embedding"])
    assert encoder.shape == reference["features"].shape[1:] and encoder.dimension == reference["embedding"].shape[1]


def test_transforms_are_those_of_transformers(both):
    encoder, folder, reference = both
    pixels_yxc = encoder.transform(decode((folder / "image.png").read_bytes()))
    np.testing.assert_allclose(pixels_yxc.transpose(2, 0, 1), reference["pixels"][0], atol=2e-6)


def test_many_images_are_encoded_as_each_alone():
    encoder = open_encoder(FIXTURES / "clip")
    pixels = list(np.random.default_rng(0).normal(size=(BATCH + 3, 15, 15, 3)).astype(np.float32))
    together, alone = encoder.encode_pixels(pixels), encoder.encode_pixels(pixels[-1:])
    assert len(together.embedding_be) == BATCH + 3
    np.testing.assert_allclose(together.features_bpd[-1:], alone.features_bpd, rtol=1e-4, atol=1e-4)
    assert encoder.encode([]).features_bpd.shape == (0, 10, 24)


@pytest.mark.peer
@pytest.mark.parametrize("kind", NAMES)
def test_a_random_model_of_transformers_is_read(kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 5,
             "image_size": 21, "patch_size": 7}  # fmt: skip
    of = {"clip": ("CLIPVisionConfig", "CLIPVisionModel"), "siglip": ("SiglipVisionConfig", "SiglipVisionModel")}
    config, model = (getattr(transformers, name) for name in of[kind])
    torch.manual_seed(1)
    model = model(config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    facts = json.loads((FIXTURES / kind / "preprocessor_config.json").read_text())
    square = {"height": 21, "width": 21}
    facts |= {"size": square} | ({"crop_size": square} if "crop_size" in facts else {})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    pixels = np.random.default_rng(2).normal(size=(2, 21, 21, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    made = open_encoder(tmp_path).encode_pixels(list(pixels))
    close(made.features_bpd, expected.last_hidden_state.numpy())
    close(made.embedding_be, expected.pooler_output.numpy())


def broken_copy(tmp_path, name="clip", **changes):
    """The fixture's folder with fields of a file changed: file__field."""
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    for key, value in changes.items():
        file, field = key.split("__")
        facts = json.loads((folder / f"{file}.json").read_text())
        part = facts.get("vision_config", facts) if field != "model_type" else facts
        part[field] = value
        (folder / f"{file}.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"config__model_type": "bert"}, "model_type is 'bert'; expected one of clip"),
        ({"config__hidden_size": "24"}, "hidden_size is '24'; expected a whole number"),
        ({"config__num_attention_heads": 5}, "num_attention_heads is 5; expected a divisor of hidden_size = 24"),
        ({"config__hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ({"config__intermediate_size": 41}, r"fc1.weight is \[40, 24\]; expected \[41, 24\]"),
        ({"config__num_hidden_layers": 3}, "has no tensor vision_model.encoder.layers.2"),
        ({"config__patch_size": 16}, "patch_size is 16; expected at most 15"),
        ({"preprocessor_config__crop_size": 14}, r"gives images of \(14, 14\)"),
        ({"preprocessor_config__image_std": [1, 0, 1]}, "image_std is"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        open_encoder(broken_copy(tmp_path, **changes))


def test_a_fingerprint_is_of_weights_and_transform(tmp_path):
    mine = open_encoder(FIXTURES / "clip").fingerprint
    assert mine != open_encoder(FIXTURES / "siglip").fingerprint
    assert mine != open_encoder(broken_copy(tmp_path, preprocessor_config__image_mean=[0.5, 0.5, 0.5])).fingerprint


def test_folders_of_a_vision_model_alone_and_older_ones_are_read(tmp_path, both):
    """transformers 5 saves a vision model without a prefix; older versions saved the numbers of positions."""
    encoder, folder, reference = both
    tensors = load_file(folder / "model.safetensors")
    alone = {n.removeprefix("vision_model."): t for n, t in tensors.items() if not n.startswith("logit")}
    for name, held in (("alone", alone), ("older", tensors | {"vision_model.embeddings.position_ids": np.arange(9)})):
        shutil.copytree(folder, tmp_path / name)
        save_file(held, tmp_path / name / "model.safetensors")
        pixels = reference["pixels"][0].transpose(1, 2, 0)
        close(open_encoder(tmp_path / name).encode_pixels([pixels]).embedding_be, reference["embedding"])
        assert open_encoder(tmp_path / name).fingerprint == encoder.fingerprint or name == "alone"


def saved(image, form="PNG", **settings):
    held = io.BytesIO()
    image.save(held, form, **settings)
    return held.getvalue()


def test_every_kind_of_image_becomes_rgb():
    grey = Image.fromarray(np.full((3, 5), 77, np.uint8))
    assert np.asarray(decode(saved(grey))).tolist() == np.full((3, 5, 3), 77).tolist()
    deep = Image.fromarray(np.full((3, 5), 77 * 257, np.uint16))
    assert np.asarray(decode(saved(deep)))[0, 0].tolist() == [77] * 3
    dark = Image.fromarray(np.full((3, 5), 200, np.uint16))
    assert np.asarray(decode(saved(dark)))[0, 0].tolist() == [0] * 3, "200 of 65,535"
    for most in (1, 255, 65535):
        light_yx = np.array([[0, 0.2, 1, np.nan, -np.inf, np.inf]], np.float32) * most
        with np.errstate(over="raise", invalid="raise"):
            found = np.asarray(decode(saved(Image.fromarray(light_yx), "TIFF")))[0, :, 0]
        assert found.tolist() == [0, 51, 255, 0, 0, 255]
    for white in (1, 255):  # a filter's overshoot makes no other pixel dark
        over_yx = np.array([[0, 0.2, 0.4, 1.001, -0.1, 1.4]], np.float32) * white
        found = np.asarray(decode(saved(Image.fromarray(over_yx), "TIFF")))[0, :, 0]
        assert found.tolist() == [0, 51, 102, 255, 0, 255]
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert np.asarray(decode(saved(clear)))[0, 0].tolist() == [255] * 3
    ink = decode(saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"))
    assert ink.mode == "RGB" and np.abs(np.asarray(ink)[0, 0].astype(int) - [255, 0, 0]).max() < 40
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    first = decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.asarray(first)[0, 0].tolist() == [255, 0, 0]
    turned = Image.new("RGB", (2, 6))
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    assert decode(saved(turned, "JPEG", exif=exif)).size == (6, 2)


def test_what_is_no_image_is_refused_in_one_line(monkeypatch):
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)))
    for data in (b"", b"not an image", whole[: len(whole) // 2]):
        with pytest.raises(ImageError, match="cannot be decoded") as caught:
            decode(data)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1599)
    with warnings.catch_warnings(), pytest.raises(ImageError, match="40 x 40; expected 1 to 1,599 pixels"):
        warnings.simplefilter("error")
        decode(whole)
    monkeypatch.setattr(transforms, "MAX_BYTES", 5)
    with pytest.raises(ImageError, match="the file is too large; expected at most 5 bytes"):
        decode(whole)


def test_a_postscript_file_is_not_run():
    """Pillow would have Ghostscript do so, whatever the file is called."""
    with pytest.raises(ImageError, match="UnidentifiedImageError"):
        decode(saved(Image.new("RGB", (3, 5)), "EPS"))


def test_sides_that_differ_too_much_are_refused():
    facts = json.loads((FIXTURES / "clip" / "preprocessor_config.json").read_text())
    transform = read_transform({**facts, "size": {"shortest_edge": 16000}}, where="here")
    with pytest.raises(ImageError, match="sides that differ less"):
        transform(Image.new("RGB", (1, 200)))


def test_small_images_are_framed_in_black():
    facts = json.loads((FIXTURES / "clip" / "preprocessor_config.json").read_text())
    transform = read_transform({**facts, "do_resize": False, "do_normalize": False, "crop_size": 6}, where="here")
    pixels_yxc = transform(Image.new("RGB", (4, 3), "white"))
    assert pixels_yxc.shape == (6, 6, 3)
    rows, columns = np.flatnonzero(pixels_yxc.any((1, 2))), np.flatnonzero(pixels_yxc.any((0, 2)))
    assert (rows.tolist(), columns.tolist()) == ([2, 3, 4], [1, 2, 3, 4])
