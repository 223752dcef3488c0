"""How many parameters a model has, from its abstract tree."""

import math

from flax import nnx

from orogen.config.model import ModelConfig
from orogen.model.lm import Built, build


def count(config: ModelConfig, built: Built | None = None) -> dict[str, int]:
    """total: all parameters, including routers' correction biases and the MTP block. active: those that one token uses,
    without the MTP block. active_without_embedding: the same without the input embedding, unless it is also the head.
    mtp: those of the MTP block. Allocates nothing. built: the model of this config, if it is built already."""
    built = built or build(config)
    leaves = [pair for tree in (built.params, built.buffers) for pair in nnx.to_flat_state(tree)]
    total = sum(math.prod(leaf.get_value().shape) for _, leaf in leaves)
    mtp = sum(math.prod(leaf.get_value().shape) for path, leaf in leaves if path[0] == "mtp")
    active = sum(_active(leaf, config) for path, leaf in leaves if path[0] != "mtp")
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {"total": total, "active": active, "active_without_embedding": active - embedding, "mtp": mtp}


def _active(leaf: nnx.Variable, config: ModelConfig) -> int:
    """The numbers of a parameter that one token uses: of routed experts, those of its top k."""
    size = math.prod(leaf.get_value().shape)
    if "expert" not in leaf.get_metadata()["axes"]:
        return size
    return size // config.n_routed_experts * config.num_experts_per_tok
