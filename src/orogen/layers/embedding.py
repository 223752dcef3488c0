"""Token embedding and output head, sharded over the vocabulary.

Letters: b batch, t time, d model, v vocabulary, p positions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.layers.documents import Documents
from orogen.layers.parameter import normal
from orogen.parallel.plan import Plan


class Embedding(nnx.Module):
    """One row per token of the vocabulary, and one per position in a document if positions are learned."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, positions, std = config.hidden_size, config.learned_positions, config.init_std
        self.vocab_size = config.vocab_size
        self.weight = normal(rngs, (config.vocab_size, size), ("vocab", "embed"), std=std)
        self.positions = normal(rngs, (positions, size), ("positions", "embed"), std=std) if positions else None

    @jax.named_scope("embedding")
    def __call__(self, tokens_bt: Array, docs: Documents, plan: Plan) -> Array:
        """(b, t, d), laid out as the residual stream. A token outside the vocabulary gives zeros, a position outside
        the table NaN; padding takes position 0."""
        rows_vd = plan.weight(self.weight)
        local_bt = tokens_bt - plan.index("vocab") * rows_vd.shape[0]
        held_bt = (local_bt >= 0) & (local_bt < rows_vd.shape[0]) & (tokens_bt < self.vocab_size)
        # The gradient drops an index past the end. If tokens of other ranks instead added zeros to some row of this
        # one, all of them would wait for each other there.
        index_bt = jnp.where(held_bt, local_bt, rows_vd.shape[0])
        x_btd = plan.leave(jnp.take(rows_vd, index_bt, axis=0, mode="fill", fill_value=0))
        if self.positions is None:
            return x_btd
        positions_bt = plan.own(jnp.where(docs.segments_bt == 0, 0, docs.positions_bt))
        return x_btd + jnp.take(plan.weight(self.positions), positions_bt, axis=0, mode="fill", fill_value=jnp.nan)


class Head(nnx.Module):
    """The matrix of the projection onto the vocabulary."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.vocab_size)
        self.weight = normal(rngs, shape, ("embed", "vocab"), std=config.init_std)


class ScoreHead(nnx.Module):
    """The vector of a reward model's scalar output, drawn from N(0, 1 / (d + 1)) (arXiv:2009.01325, appendix B)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.weight = normal(rngs, (config.hidden_size,), ("norm",), std=(config.hidden_size + 1) ** -0.5)


def table(vectors: nnx.Param, plan: Plan) -> Array:
    """The table of vectors (n, d), whole on every rank, for lookups."""
    return plan.weight(vectors)


def scores(x_btd: Array, head: ScoreHead, plan: Plan) -> Array:
    """x · head, (b, t) in float32."""
    return jnp.sum(x_btd.astype(jnp.float32) * plan.weight(head.weight), axis=-1)


def logits(x_btd: Array, head_dv: Array, plan: Plan) -> Array:
    """x · head, (b, t, v) in float32, whole on every rank. head_dv: this rank's columns of the vocabulary."""
    # Rows are flattened first: with an axis t of 1, XLA:CPU multiplies one row at a time and reads the head for each
    # (8 rows, 512 x 16,384: 8.0 ms; flattened: 2.1 ms; measured with jax 0.10.1).
    logits_nv = jnp.matmul(x_btd.reshape(-1, x_btd.shape[-1]), head_dv, preferred_element_type=jnp.float32)
    return plan.gather(logits_nv.reshape(*x_btd.shape[:-1], -1), "vocab", dim=2)
