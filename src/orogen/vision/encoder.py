"""A frozen vision model with its image transform, read from a Hugging Face folder.

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
from orogen.vision.tower import CLIP, Encoded, Tower, TowerConfig, read_tower_config
from orogen.vision.transforms import Transform, read_transform

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
BATCH = 32  # images per call; the last call is padded, so that one program serves all


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision model. name: what it was read from; fingerprint: of its weights, config and transform: features and
    embeddings of two encoders with different ones have nothing in common. shape: (p, v); dimension: e."""

    name: str
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


def open_encoder(folder: Path) -> Encoder:
    """The vision model of a Hugging Face CLIP or SigLIP folder: config.json, preprocessor_config.json, safetensors.

    Weights are used in float32. Raises ConfigError, OSError.
    """
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
    graph, state = nnx.split(tower)
    dimension = config.hidden_size if tower.project is None else tower.project[...].shape[0]

    def run(pixels_byxc: Any) -> Encoded:
        return nnx.merge(graph, state)(pixels_byxc)

    shape = config.vectors, config.hidden_size
    return Encoder(folder.name, digest.hexdigest(), transform, shape, dimension, run)


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
