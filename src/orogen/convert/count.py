"""The size of a model's Hugging Face checkpoint, from the abstract parameter tree and the table of names."""

import math

from flax import nnx

from orogen.config.checks import ConfigError
from orogen.config.dtype import BYTES
from orogen.config.model import ModelConfig
from orogen.convert.config import family_of
from orogen.convert.names import leaf_shapes, mtp_name, table
from orogen.model.count import count
from orogen.model.lm import build


def count_exported(config: ModelConfig) -> dict[str, int | None]:
    """`model.count.count` of the Hugging Face checkpoint, its number of tensors, and their bytes in bfloat16
    (correction biases: float32).

    The MTP block includes the copies of embedding and head that DeepSeek's files give it. tensors and bytes are None if
    no Hugging Face family can hold the model.
    """
    built = build(config)
    counts = count(config, built)
    try:
        family = family_of(config)
    except ConfigError:
        return {**counts, "tensors": None, "bytes": None}
    tensors = table(family, config)
    tree = {path: v.get_value().shape for part in (built.params, built.buffers) for path, v in nnx.to_flat_state(part)}
    if tree != leaf_shapes(tensors):
        raise ValueError(f"the names of {family} do not cover the model's parameters")
    written = {name: tensor for name, tensor in tensors.items() if tensor.written}
    sizes = {name: math.prod(tensor.shape) for name, tensor in written.items()}
    is_mtp = mtp_name(family, config)
    return {
        **counts,
        "total": sum(sizes.values()),
        "mtp": sum(size for name, size in sizes.items() if is_mtp(name)),
        "tensors": len(written),
        "bytes": sum(size * BYTES["float32" if written[name].float32 else "bfloat16"] for name, size in sizes.items()),
    }
