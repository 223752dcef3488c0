"""Token embedding and output head, split over the vocabulary. Letters: b batch, t time, d model, v vocabulary."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.layers.parameter import normal
from orogen.parallel.plan import Plan


class Embedding(nnx.Module):
    """A row for each token of the vocabulary."""

    def __init__(self, vocab_size: int, size: int, *, std: float, rngs: nnx.Rngs):
        self.weight = normal(rngs, (vocab_size, size), ("vocab", "embed"), std=std)

    def __call__(self, tokens_bt: Array, plan: Plan) -> Array:
        """Rows of `tokens_bt`, (b, t of this rank's sequence piece, d). A token outside the vocabulary gives zeros."""
        rows_vd = plan.weight(self.weight)
        local_bt = tokens_bt - plan.index("vocab") * rows_vd.shape[0]
        held_bt = (local_bt >= 0) & (local_bt < rows_vd.shape[0])
        x_btd = jnp.where(held_bt[..., None], rows_vd[jnp.where(held_bt, local_bt, 0)], 0)
        return plan.scatter(x_btd, "sequence")


class Head(nnx.Module):
    """The projection onto the vocabulary."""

    def __init__(self, size: int, vocab_size: int, *, std: float, rngs: nnx.Rngs):
        self.weight = normal(rngs, (size, vocab_size), ("embed", "vocab"), std=std)

    def __call__(self, x_btd: Array, plan: Plan) -> Array:
        """Logits (b, t, v) in float32, whole on every rank."""
        logits_btv = jnp.einsum("btd,dv->btv", x_btd, plan.weight(self.weight), preferred_element_type=jnp.float32)
        return plan.gather(logits_btv, "vocab", dim=2)
