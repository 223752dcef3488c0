"""The perceiver resampler: an image's feature vectors, however many, as a few vectors of the model's width; and the
encoder of captions retrieved for an image, whose vectors stand beside them.

Letters: b batch, t time of this rank, s time or what attention reads, w numbers of a token, f numbers of a row or
hidden, i numbers of an image, m captions, c tokens of a caption, p feature vectors of an image, v their width, l
latents, d model, n images, k head size.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.config.recipe import PLAIN, RECIPES
from orogen.config.vision import CAPTIONS, FEATURES, IMAGE
from orogen.layers.embedding import table
from orogen.layers.linear import linear_plain
from orogen.layers.mlp import MLP
from orogen.layers.norm import make_norm
from orogen.layers.parameter import normal
from orogen.model.cross_attention import Images, attend_all
from orogen.parallel.context import whole
from orogen.parallel.plan import Plan

WIDENING = 4  # hidden units of the resampler's MLP, as a multiple of its width; Flamingo's value


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
        sizes = config.retrieved_captions, config.caption_tokens
        self.captions = None if None in sizes else CaptionEncoder(config, rngs)

    @jax.named_scope("resampler")
    def __call__(self, features_npv: Array, plan: Plan) -> Array:
        """(n, l, d), whole on every rank of `tensor`. The gradients of these ranks add up."""
        plan = _plain(plan)
        features_npd = linear_plain(features_npv.astype(self.project.get_value().dtype), self.project, plan)
        latents_ld: Array = self.latents[...]
        x_nld = jnp.broadcast_to(latents_ld, (len(features_npv), *latents_ld.shape))
        for layer in self.layers:
            x_nld = layer(x_nld, features_npd, plan)
        return self.norm(x_nld, plan)

    def images(self, extras: Mapping[str, Array], plan: Plan) -> Images | None:
        """The images of a batch with these extras; None if it has none. Raises ValueError if the extras are too small
        for one image per row."""
        if FEATURES not in extras:
            return None
        features_bni = _of_images(extras[FEATURES], self.vectors * self.width, FEATURES, plan)
        count = features_bni.shape[1]
        if self.captions is not None:
            tokens_bni = _of_images(extras[CAPTIONS], self.captions.size, CAPTIONS, plan)
            count = min(count, tokens_bni.shape[1])  # either extra may have space for more images than rows have
        rows = len(features_bni)
        features_npv = features_bni[:, :count].reshape(rows * count, self.vectors, self.width)
        seen_nld = self(features_npv, plan)
        if self.captions is not None:
            captions_nld = self.captions(tokens_bni[:, :count].reshape(rows * count, -1), plan)
            seen_nld = jnp.concatenate([seen_nld, captions_nld.astype(seen_nld.dtype)], axis=1)
        each, size = seen_nld.shape[1:]
        image_n = 1 + jnp.arange(count * each, dtype=jnp.int32) // each
        image_bn = jnp.broadcast_to(image_n, (rows, count * each))
        return Images(seen_nld.reshape(rows, count * each, size), image_bn, extras[IMAGE])


def _of_images(extra_btw: Array, size: int, name: str, plan: Plan) -> Array:
    """(b, images, size): the numbers of an extra, image by image. Raises ValueError if it is too small for one
    image."""
    extra_bsw = whole(extra_btw, plan)
    flat_bf = extra_bsw.reshape(len(extra_bsw), -1)
    count = flat_bf.shape[1] // size
    if not count:
        raise ValueError(f"{name} has {flat_bf.shape[1]} numbers per row; expected {size} or more")
    return flat_bf[:, : count * size].reshape(len(flat_bf), count, size)


class CaptionEncoder(nnx.Module):
    """Encodes the tokens of retrieved captions, each caption by itself and without a causal mask, as RETRO encodes the
    chunks that it retrieves (arXiv:2112.04426, section 2.4). Padding is encoded like any token: it marks a caption's
    end."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.init_std
        self.length = config.caption_tokens
        self.size = config.retrieved_captions * self.length
        self.tokens = normal(rngs, (config.vocab_size, size), (None, "embed"), std=std)
        self.positions = normal(rngs, (self.length, size), (None, "embed"), std=std)
        self.layers = nnx.List([ResamplerLayer(config, rngs, reads=False) for _ in range(config.resampler_layers)])
        self.norm = make_norm(config)

    @jax.named_scope("captions")
    def __call__(self, token_ns: Array, plan: Plan) -> Array:
        """(n, s, d) of the tokens (n, s) of all captions of each image."""
        plan = _plain(plan)
        x_mcd = table(self.tokens, plan)[token_ns.reshape(-1, self.length)] + table(self.positions, plan)
        for layer in self.layers:
            x_mcd = layer(x_mcd, None, plan)
        return self.norm(x_mcd, plan).reshape(*token_ns.shape, -1)


def _plain(plan: Plan) -> Plan:
    """The plan for arrays that are whole on every rank, in the compute dtype."""
    return dataclasses.replace(plan.with_stream("whole"), recipe=RECIPES[PLAIN], recipes=None, rounding=None)


class ResamplerLayer(nnx.Module):
    """x + attention(norm(x), [norm(features); norm(x)]), then x + MLP(norm(x)). Heads and hidden units are sharded.

    reads: whether there are features; without them, x attends to itself alone.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, reads: bool = True):
        size, std, self.head_dim = config.hidden_size, config.init_std, config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.feature_norm = make_norm(config) if reads else None
        self.latent_norm, self.mlp_norm = make_norm(config), make_norm(config)
        self.query = normal(rngs, (size, queries), ("embed", "heads"), std=std)
        self.key = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.value = normal(rngs, (size, keys), ("embed", "kv_heads"), std=std)
        self.out = normal(rngs, (queries, size), ("heads", "embed"), std=config.output_init_std)
        self.mlp = MLP(config, WIDENING * size, bias=False, rngs=rngs)

    def __call__(self, x_nld: Array, features_npd: Array | None, plan: Plan) -> Array:
        h_nld = read_nsd = self.latent_norm(x_nld, plan)
        if self.feature_norm is not None and features_npd is not None:
            read_nsd = jnp.concatenate([self.feature_norm(features_npd, plan), h_nld], axis=1)
        q_nlf, k_nsf, v_nsf = (
            linear_plain(a, w, plan) for a, w in ((h_nld, self.query), (read_nsd, self.key), (read_nsd, self.value))
        )
        y_nlhk = attend_all(*(a.reshape(*a.shape[:2], -1, self.head_dim) for a in (q_nlf, k_nsf, v_nsf)))
        x_nld = x_nld + plan.leave(linear_plain(y_nlhk.reshape(q_nlf.shape), self.out, plan))
        return x_nld + self.mlp.transform(self.mlp_norm(x_nld, plan), plan)
