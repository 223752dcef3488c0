"""The layers that connect a language model to images: tanh-gated cross-attention, and a tanh-gated MLP.

Both begin as the identity, since their gates are zero: a model into which they are inserted computes what it did
before. Source: Flamingo, arXiv:2204.14198, section 3.1.2, whose GATED XATTN-DENSE block is the two layers `xg`.

Letters: b batch, t time, d model, n vectors of a row's images, h query heads, g key heads, k head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from orogen.config.model import ModelConfig
from orogen.kernels.attention import attention
from orogen.layers.documents import Documents
from orogen.layers.linear import linear_plain
from orogen.layers.mlp import MLP
from orogen.layers.parameter import normal, parameter
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like


class Images(NamedTuple):
    """What a cross-attention layer is `given`.

    vectors_bnd: the images of each row, resampled. image_bn: int32, the image, 1, 2, …, that each vector belongs to.
    image_bt: int32, the image that each token attends to: the latest before it in its own document, 0 for none.
    """

    vectors_bnd: Any
    image_bn: Any
    image_bt: Any


class GatedCrossAttention(nnx.Module):
    """tanh(gate) · softmax(q kᵀ / √k) v W_o over the vectors of the image that a token attends to; 0 without one.

    Products are in the compute dtype whatever the recipe: a recipe rounds by token index and sequence, which the
    vectors of images do not have.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.init_std
        self.head_dim = config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.query = normal(rngs, (size, queries), ("embed", "heads"), std=std)
        self.key = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.value = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.out = normal(rngs, (queries, size), ("heads", "embed"), std=config.output_init_std)
        self.tanh_gate = parameter(jnp.zeros(1), ("norm",))

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: Images | None = None) -> tuple[Array, None]:
        """y (b, t, d); zeros for text without images, where nothing is given."""
        if given is None:
            return jnp.zeros_like(x_btd), None
        with jax.named_scope("in_proj"):
            q_bthk = self._heads(checkpoint_name(linear_plain(plan.enter(x_btd), self.query, plan), "query"))
            k_bngk, v_bngk = (
                self._heads(checkpoint_name(linear_plain(given.vectors_bnd, weight, plan), name))
                for name, weight in (("key", self.key), ("value", self.value))
            )
        with jax.named_scope("core"):
            y_bthk = attend_all(q_bthk, k_bngk, v_bngk, given.image_bt, given.image_bn)
            y_bthk = checkpoint_name(y_bthk, "attention")
        with jax.named_scope("out_proj"):
            y_btd = plan.leave(linear_plain(y_bthk.reshape(*y_bthk.shape[:2], -1), self.out, plan))
        return gated(y_btd, self.tanh_gate), None

    def start(self, allocator: Any, dtype: Any) -> None:
        """None: it keeps no tokens, and is given its images with every piece."""

    def cache_axes(self, allocator: Any) -> None:
        """None, as in `start`."""

    def _heads(self, x_btf: Array) -> Array:
        return x_btf.reshape(*x_btf.shape[:2], -1, self.head_dim)


class GatedMLP(nnx.Module):
    """tanh(gate) · MLP(x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.mlp = MLP(config, config.intermediate_size, bias=config.mlp_bias, rngs=rngs)
        self.tanh_gate = parameter(jnp.zeros(1), ("norm",))

    def __call__(self, x_btd: Array, docs: Documents, plan: Plan, given: None = None) -> tuple[Array, None]:
        """y (b, t, d)."""
        return gated(self.mlp.transform(x_btd, plan), self.tanh_gate), None

    def start(self, allocator: Any, dtype: Any) -> None:
        """None: the layer treats each token by itself."""

    def cache_axes(self, allocator: Any) -> None:
        """None, as in `start`."""


def gated(y_btd: Array, gate: nnx.Param) -> Array:
    """tanh(gate) · y, in y's dtype."""
    return jnp.tanh(gate[...]).astype(y_btd.dtype) * checkpoint_name(y_btd, "branch")


def attend_all(
    q_bthk: Array, k_bngk: Array, v_bngk: Array, group_bt: Array | None = None, group_bn: Array | None = None
) -> Array:
    """Attention (b, t, h, k) of each query to all keys of its group, whether earlier or later. Groups None: one
    group."""
    last_t = jnp.full(q_bthk.shape[1], k_bngk.shape[1] - 1, jnp.int32)  # no key comes after any query
    # All scores at once: a row has far fewer vectors of images than tokens.
    return attention(
        *vary_like((q_bthk, k_bngk, v_bngk), (q_bthk, k_bngk, v_bngk)), segments_bt=group_bt, kv_segments_bs=group_bn,
        q_index=last_t, scale=q_bthk.shape[-1] ** -0.5, implementation="full",
    )  # fmt: skip


def seen_by(items: tuple[Any, ...], images: Images | None, letter: str = "x") -> Any:
    """`images` as a stack of these items (`block.Items`) is given them: an entry per cross-attention layer. None if
    there are no images."""
    if images is None:
        return None
    found = []
    for item in items:
        if isinstance(item, str):
            found.append(images if item == letter else None)
        else:
            spread = lambda a, n=item.count: jnp.broadcast_to(a, (n, *a.shape))  # noqa: E731
            found.append(jax.tree.map(spread, seen_by(item.items, images, letter)))
    return tuple(found)
