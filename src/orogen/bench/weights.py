"""Our parameters as a folder that transformers reads."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.convert.huggingface import to_hf
from orogen.convert.tensor_files import Spec


def export_weights(model: ModelConfig, params: nnx.State, buffers: nnx.State, folder: Path) -> None:
    """Writes `folder`, which must not exist, with config.json and every tensor in the dtype that it has here."""
    flat = [(path, leaf) for tree in (params, buffers) for path, leaf in dict(nnx.to_flat_state(tree)).items()]
    leaves: dict[Any, np.ndarray] = {path: np.asarray(leaf.get_value()) for path, leaf in flat}
    specs = {path: Spec(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
    to_hf(model, specs, lambda path, index: leaves[path][index], folder.parent / "no_tokenizer", folder)
