"""A model in memory, written as an Orogen checkpoint folder."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import CONFIG
from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.config.files import write_atomically
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.convert.tensor_files import Spec, TensorWriter, new_folder


def write_folder(target: Path, model: ModelConfig, params: nnx.State, buffers: nnx.State) -> None:
    """Writes parameters and buffers of the whole model, in their dtypes and without a tokenizer, into the new folder
    `target`, which appears when it is complete. Raises ConfigError if it exists."""
    arrays = {dotted(path): leaf.get_value() for path, leaf in leaves_of(params, buffers).items()}
    specs = {name: Spec(array.shape, np.dtype(array.dtype)) for name, array in arrays.items()}
    with new_folder(target) as scratch:
        with TensorWriter(scratch, specs) as writer:
            for name, array in arrays.items():
                writer.write(name, np.asarray(jax.device_get(array)))
        write_atomically(scratch / CONFIG, model_text(model).encode())
        checksums.write(scratch)
