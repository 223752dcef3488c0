"""How many parameters a model has, from its abstract tree."""

import math
from typing import Any

import jax
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.model.lm import Built, build


def count(config: ModelConfig, built: Built | None = None) -> dict[str, int]:
    """total: all parameters, including routers' correction biases and the MTP block. active: those that one token uses,
    without the MTP block. active_without_embedding: the same without the input embedding, unless it is also the head.
    mtp: those of the MTP block. Allocates nothing. built: the model of this config, if it is built already."""
    built = built or build(config)
    sizes = [(path, leaf) for tree in (built.params, built.buffers) for path, leaf in _leaves(tree)]
    total = sum(math.prod(leaf.get_value().shape) for _, leaf in sizes)
    mtp = sum(math.prod(leaf.get_value().shape) for path, leaf in sizes if path[0] == "mtp")
    active = sum(_active(leaf, config) for path, leaf in sizes if path[0] != "mtp")
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return {"total": total, "active": active, "active_without_embedding": active - embedding, "mtp": mtp}


def _active(leaf: nnx.Variable, config: ModelConfig) -> int:
    size = math.prod(leaf.get_value().shape)
    if "expert" not in leaf.get_metadata()["axes"]:
        return size
    return size // config.n_routed_experts * config.num_experts_per_tok


def _leaves(tree: nnx.State) -> list[tuple[tuple[Any, ...], nnx.Variable]]:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return [(tuple(getattr(key, "key", key) for key in path), leaf) for path, leaf in found]
