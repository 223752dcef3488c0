"""Grouped-query attention without positions, as in Nemotron-H.

Letters: b batch, t time, d model, h query heads, g key heads, k head size.
"""

from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.kernels.attention import attention
from orogen.layers.documents import Documents
from orogen.layers.linear import linear
from orogen.layers.parameter import normal
from orogen.parallel.plan import Plan


class Attention(nnx.Module):
    """softmax(q kᵀ / √k) v, causal and inside documents; query head i reads key head i // (h/g)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.init_std
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.query = normal(rngs, (size, queries), ("embed", "heads"), std=std)
        self.key = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.value = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.out = normal(rngs, (queries, size), ("heads", "embed"), std=config.output_init_std)

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan) -> Array:
        h_btd = plan.gather(x_btd, "sequence")
        q_bthk, k_btgk, v_btgk = (
            linear(h_btd, plan.weight(w)).reshape(*h_btd.shape[:2], -1, self.head_dim)
            for w in (self.query, self.key, self.value)
        )
        y_bthk = attention(
            q_bthk,
            k_btgk,
            v_btgk,
            segments_bt=docs.segments_bt,
            scale=self.head_dim**-0.5,
            implementation=plan.config.attention,
        )
        return plan.scatter(linear(y_bthk.reshape(*y_bthk.shape[:2], -1), plan.weight(self.out)), "sequence")
