"""The perceiver resampler: an image's feature vectors, however many, as a few vectors of the model's width.

Letters: b batch, s time, w numbers of a token, f numbers of a row, p feature vectors of an image, v their width, l
latents, d model, n images of all rows, k head size.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.config.recipe import PLAIN, RECIPES
from orogen.config.vision import FEATURES, IMAGE
from orogen.layers.linear import linear_plain
from orogen.layers.mlp import MLP
from orogen.layers.norm import make_norm
from orogen.layers.parameter import normal
from orogen.model.cross_attention import Images, attend_all
from orogen.parallel.context import whole
from orogen.parallel.plan import Plan

WIDENING = 4  # hidden units of the resampler's MLP over its width, as Flamingo has them


class Resampler(nnx.Module):
    """Learned latents that attend to an image's features and to themselves (Flamingo, arXiv:2204.14198, section 3.1.1
    and appendix A.1.1, for one image, without time embeddings)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.init_std
        self.vectors, self.width = config.image_features, config.image_feature_size
        self.project = normal(rngs, (config.image_feature_size, size), (None, "embed"), std=std)
        self.latents = normal(rngs, (config.resampler_latents, size), ("positions", "norm"), std=1.0)
        self.layers = nnx.List([ResamplerLayer(config, rngs) for _ in range(config.resampler_layers)])
        self.norm = make_norm(config)

    @jax.named_scope("resampler")
    def __call__(self, features_npv: Array, plan: Plan) -> Array:
        """(n, l, d), whole on every rank of `tensor`, whose gradients add up."""
        plan = dataclasses.replace(plan.with_stream("whole"), recipe=RECIPES[PLAIN], recipes=None, rounding=None)
        features_npd = linear_plain(features_npv.astype(self.project.get_value().dtype), self.project, plan)
        latents_ld: Array = self.latents[...]
        x_nld = jnp.broadcast_to(latents_ld, (len(features_npv), *latents_ld.shape))
        for layer in self.layers:
            x_nld = layer(x_nld, features_npd, plan)
        return self.norm(x_nld, plan)

    def images(self, extras: Mapping[str, Array], plan: Plan) -> Images | None:
        """The images of a batch with these extras; None if it has none. Raises ValueError if a row has no room for an
        image."""
        if FEATURES not in extras:
            return None
        features_bsw = whole(extras[FEATURES], plan)
        rows, size = len(features_bsw), self.vectors * self.width
        features_bf = features_bsw.reshape(rows, -1)
        count = features_bf.shape[1] // size
        if not count:
            raise ValueError(f"{FEATURES} has {features_bf.shape[1]} numbers per row; expected {size} or more")
        features_npv = features_bf[:, : count * size].reshape(rows * count, self.vectors, self.width)
        resampled_nld = self(features_npv, plan)
        latents, size = resampled_nld.shape[1:]
        image_n = 1 + jnp.arange(count * latents, dtype=jnp.int32) // latents
        image_bn = jnp.broadcast_to(image_n, (rows, count * latents))
        return Images(resampled_nld.reshape(rows, count * latents, size), image_bn, extras[IMAGE])


class ResamplerLayer(nnx.Module):
    """x + attention(norm(x), [norm(features); norm(x)]), then x + MLP(norm(x)). Heads and hidden units are sharded."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, std, self.head_dim = config.hidden_size, config.init_std, config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.feature_norm, self.latent_norm, self.mlp_norm = (make_norm(config) for _ in range(3))
        self.query = normal(rngs, (size, queries), ("embed", "heads"), std=std)
        self.key = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.value = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.out = normal(rngs, (queries, size), ("heads", "embed"), std=config.output_init_std)
        self.mlp = MLP(config, WIDENING * size, bias=False, rngs=rngs)

    def __call__(self, x_nld: Array, features_npd: Array, plan: Plan) -> Array:
        h_nld = self.latent_norm(x_nld, plan)
        read_nsd = jnp.concatenate([self.feature_norm(features_npd, plan), h_nld], axis=1)
        q_nlf, k_nsf, v_nsf = (
            linear_plain(a, w, plan) for a, w in ((h_nld, self.query), (read_nsd, self.key), (read_nsd, self.value))
        )
        y_nlhk = attend_all(*(a.reshape(*a.shape[:2], -1, self.head_dim) for a in (q_nlf, k_nsf, v_nsf)))
        x_nld = x_nld + plan.leave(linear_plain(y_nlhk.reshape(q_nlf.shape), self.out, plan))
        return x_nld + self.mlp.transform(self.mlp_norm(x_nld, plan), plan)
