"""Multi-token prediction: one block, applied once per depth, that predicts the token after the next (and so on).

Letters: b batch, t time, d model. Sources: arXiv:2412.19437, section 2.2; Megatron's repeated MTP layer.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.layers.documents import Documents, numbered
from orogen.layers.linear import linear
from orogen.layers.norm import make_norm
from orogen.layers.parameter import normal
from orogen.model.block import Items, Stack
from orogen.parallel.context import later
from orogen.parallel.plan import Plan


def shifted_segments(segments_bt: Array, steps: int, plan: Plan) -> Array:
    """The segment ids of tokens whose document goes on for `steps` more tokens; 0 elsewhere.

    For a part of a row the ids must be as `documents` numbers them, since a rank does not see where runs end."""
    ids_bt = numbered(segments_bt) if plan.size("context") == 1 else segments_bt
    return jnp.where(ids_bt == later(ids_bt, steps, plan), segments_bt, 0)


def shifted(docs: Documents, steps: int, plan: Plan) -> Documents:
    """`docs` without the last `steps` tokens of each document, which become padding."""
    return docs._replace(segments_bt=shifted_segments(docs.segments_bt, steps, plan))


class MTPBlock(nnx.Module):
    """h' = norm(layers(project([enorm(embedding of a later token); hnorm(h)]))), the embedding first."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, items: Items):
        size = config.hidden_size
        self.embedding_norm, self.hidden_norm = make_norm(config), make_norm(config)
        self.project = normal(rngs, (2 * size, size), (None, "embed"), std=config.init_std)
        self.layers = Stack(items, config, rngs)
        self.final_norm = make_norm(config)

    def __call__(
        self, h_btd: Array, embedded_btd: Array, docs: Documents, plan: Plan, given: Any = None
    ) -> tuple[Array, Any]:
        """The next depth's hidden state and what the layers keep, from the previous depth's hidden state and the
        embeddings of tokens one position later.

        docs: from `shifted`, which excludes tokens without a later token in their document.
        """
        joined_btd = jnp.concatenate([self.embedding_norm(embedded_btd, plan), self.hidden_norm(h_btd, plan)], axis=-1)
        # The projection has the recipe of the block's first layer.
        x_btd, kept = self.layers(linear(joined_btd, self.project, plan.of_layer(), "mtp_project"), docs, plan, given)
        return self.final_norm(x_btd, plan), kept
