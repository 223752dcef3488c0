"""Exports our parameters as a folder that transformers reads."""

from pathlib import Path

from flax import nnx

from orogen.checkpoint.transfer import model_tensors, to_hf
from orogen.config.model import ModelConfig


def export_weights(model: ModelConfig, params: nnx.State, buffers: nnx.State, folder: Path) -> None:
    """Writes `folder`, which must not exist, with config.json and every tensor in its present dtype."""
    to_hf(model, *model_tensors(params, buffers), folder.parent / "no_tokenizer", folder)
