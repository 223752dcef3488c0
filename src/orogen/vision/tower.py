"""Vision transformers as CLIP and SigLIP have them, computed in float32 with frozen weights.

Letters: b batch, y x rows and columns of pixels, c colours, p patches and the class token before them if there is one,
d width, f hidden, h heads, k head size, e embedding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.config.checks import ConfigError
from orogen.config.json_file import Number, Record, Whole, check_form
from orogen.layers.mlp import ACTIVATIONS
from orogen.model.cross_attention import attend_all

SIGMOID_SLOPE = 1.702  # of CLIP's quick_gelu
HIDDEN_ACTS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(SIGMOID_SLOPE * x),
    "gelu": ACTIVATIONS["gelu"],
    "gelu_pytorch_tanh": ACTIVATIONS["gelu_tanh"],
}
CLIP, SIGLIP = "clip", "siglip"
# transformers' own values of the fields that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    CLIP: {"image_size": 224, "patch_size": 32, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
    SIGLIP: {"image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072,
             "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh",
             "layer_norm_eps": 1e-6, "num_channels": 3},
}  # fmt: skip
SIZES = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FORM = Record({}, {**dict.fromkeys(SIZES, Whole(1, 2**20)), "hidden_act": str, "layer_norm_eps": Number()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The `vision_config` of a Hugging Face config.json. family: clip or siglip."""

    family: str
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def side(self) -> int:
        """Patches along a side; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def vectors(self) -> int:
        """Feature vectors of an image: its patches, and CLIP's class token."""
        return self.side**2 + (self.family == CLIP)


def read_tower_config(facts: Mapping[str, Any], *, where: str) -> TowerConfig:
    """The tower of a config.json: of a whole CLIP or SigLIP model, or of its vision model. Raises ConfigError."""
    kind = facts.get("model_type")
    families = {name: name.split("_")[0] for name in (CLIP, "clip_vision_model", SIGLIP, "siglip_vision_model")}
    if kind not in families:
        raise ConfigError(f"{where}: model_type is {kind!r}; expected one of {', '.join(families)}")
    family = families[kind]
    own = facts if kind.endswith("_vision_model") else facts.get("vision_config")
    if not isinstance(own, dict):
        raise ConfigError(f"{where}: vision_config is {own!r}; expected an object")
    check_form(own, FORM, where=where)
    values = {name: own.get(name, default) for name, default in DEFAULTS[family].items()}
    if values.pop("num_channels") != 3:
        raise ConfigError(f"{where}: num_channels is {own['num_channels']!r}; expected 3")
    config = TowerConfig(family=family, **values)
    if config.hidden_act not in HIDDEN_ACTS:
        raise ConfigError(f"{where}: hidden_act is {config.hidden_act!r}; expected one of {', '.join(HIDDEN_ACTS)}")
    if config.hidden_size % config.num_attention_heads:
        expected = f"a divisor of hidden_size = {config.hidden_size}"
        raise ConfigError(f"{where}: num_attention_heads is {config.num_attention_heads}; expected {expected}")
    if not config.side:
        raise ConfigError(f"{where}: patch_size is {config.patch_size}; expected at most {config.image_size}")
    return config


class Encoded(NamedTuple):
    """An image's features (b, p, d), of the last layer; its embedding (b, e), CLIP's projected or SigLIP's pooled."""

    features_bpd: Any
    embedding_be: Any


# (name, shape) -> the tensor. A name may be absent only if `optional`.
Read = Callable[..., np.ndarray]


class Tower(nnx.Module):
    """The vision model of CLIP (arXiv:2103.00020) or SigLIP (arXiv:2303.15343), as transformers 5.23 computes it."""

    def __init__(self, config: TowerConfig, read: Read, *, projection: int | None = None):
        """read: tensors by their names below `vision_model`; projection: the width of CLIP's, None without one."""
        size, patch = config.hidden_size, config.patch_size
        self.side, self.patch = config.side, patch
        kernel_dcyx = read("embeddings.patch_embedding.weight", (size, 3, patch, patch))
        self.kernel = nnx.Param(jnp.asarray(kernel_dcyx.transpose(2, 3, 1, 0).reshape(-1, size)))
        self.positions = nnx.Param(jnp.asarray(read("embeddings.position_embedding.weight", (config.vectors, size))))
        is_clip = config.family == CLIP
        take = lambda name, *shape: nnx.Param(jnp.asarray(read(name, shape)))  # noqa: E731
        self.class_token = take("embeddings.class_embedding", size) if is_clip else None
        self.bias = None if is_clip else take("embeddings.patch_embedding.bias", size)
        norm = lambda name: Norm(read, name, config)  # noqa: E731
        self.pre_norm = norm("pre_layrnorm") if is_clip else None
        self.layers = nnx.List([Block(read, f"encoder.layers.{n}", config) for n in range(config.num_hidden_layers)])
        self.post_norm = norm("post_layernorm")
        self.pool = None if is_clip else Pool(read, "head", config)
        self.project = None if projection is None else take("visual_projection.weight", projection, size)

    def __call__(self, pixels_byxc: Array) -> Encoded:
        """The features and embeddings of normalised pixels (b, y, x, 3), float32."""
        x_bpd = self._patches(pixels_byxc)
        if self.class_token is not None:
            first_b1d = jnp.broadcast_to(self.class_token[...], (len(x_bpd), 1, x_bpd.shape[-1]))
            x_bpd = jnp.concatenate([first_b1d, x_bpd], axis=1)
        x_bpd = x_bpd + self.positions[...]
        if self.pre_norm is not None:
            x_bpd = self.pre_norm(x_bpd)
        for layer in self.layers:
            x_bpd = layer(x_bpd)
        if self.pool is not None:
            x_bpd = self.post_norm(x_bpd)
            return Encoded(x_bpd, self.pool(x_bpd))
        pooled_bd = self.post_norm(x_bpd[:, 0])
        return Encoded(x_bpd, pooled_bd if self.project is None else pooled_bd @ self.project[...].T)

    def _patches(self, pixels_byxc: Array) -> Array:
        """The embedded patches (b, p, d)."""
        batch, side, patch = len(pixels_byxc), self.side, self.patch
        seen = pixels_byxc[:, : side * patch, : side * patch].reshape(batch, side, patch, side, patch, 3)
        x_bpd = seen.swapaxes(2, 3).reshape(batch, side * side, -1) @ self.kernel[...]
        return x_bpd if self.bias is None else x_bpd + self.bias[...]


class Dense(nnx.Module):
    """x W + b, for weights stored as (out, in)."""

    def __init__(self, read: Read, name: str, inward: int, outward: int):
        self.weight = nnx.Param(jnp.asarray(read(f"{name}.weight", (outward, inward)).T))
        self.bias = nnx.Param(jnp.asarray(read(f"{name}.bias", (outward,))))

    def __call__(self, x_bpd: Array) -> Array:
        return x_bpd @ self.weight[...] + self.bias[...]


class Norm(nnx.Module):
    """LayerNorm."""

    def __init__(self, read: Read, name: str, config: TowerConfig):
        size, self.epsilon = (config.hidden_size,), config.layer_norm_eps
        self.weight, self.bias = (nnx.Param(jnp.asarray(read(f"{name}.{part}", size))) for part in ("weight", "bias"))

    def __call__(self, x_bpd: Array) -> Array:
        return jax.nn.standardize(x_bpd, epsilon=self.epsilon) * self.weight[...] + self.bias[...]


class FeedForward(nnx.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, read: Read, name: str, config: TowerConfig):
        size, hidden, self.act = config.hidden_size, config.intermediate_size, config.hidden_act
        self.up, self.down = Dense(read, f"{name}.fc1", size, hidden), Dense(read, f"{name}.fc2", hidden, size)

    def __call__(self, x_bpd: Array) -> Array:
        return self.down(HIDDEN_ACTS[self.act](self.up(x_bpd)))


class Block(nnx.Module):
    """x + attention(norm x), then x + MLP(norm x); every patch sees every other."""

    def __init__(self, read: Read, name: str, config: TowerConfig):
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.first_norm, self.second_norm = (Norm(read, f"{name}.layer_norm{n}", config) for n in (1, 2))
        dense = lambda part: Dense(read, f"{name}.self_attn.{part}", size, size)  # noqa: E731
        self.query, self.key, self.value, self.out = map(dense, ("q_proj", "k_proj", "v_proj", "out_proj"))
        self.mlp = FeedForward(read, f"{name}.mlp", config)

    def __call__(self, x_bpd: Array) -> Array:
        h_bpd = self.first_norm(x_bpd)
        y_bpd = heads_attend(self.query(h_bpd), self.key(h_bpd), self.value(h_bpd), self.heads)
        x_bpd = x_bpd + self.out(y_bpd)
        return x_bpd + self.mlp(self.second_norm(x_bpd))


class Pool(nnx.Module):
    """SigLIP's pooling: a learned probe attends to all patches, then x + MLP(norm x)."""

    def __init__(self, read: Read, name: str, config: TowerConfig):
        size, self.heads = config.hidden_size, config.num_attention_heads
        self.probe = nnx.Param(jnp.asarray(read(f"{name}.probe", (1, 1, size))))
        joint = read(f"{name}.attention.in_proj_weight", (3 * size, size))
        self.weights = nnx.List([nnx.Param(jnp.asarray(part.T)) for part in np.split(joint, 3)])
        joint = read(f"{name}.attention.in_proj_bias", (3 * size,))
        self.biases = nnx.List([nnx.Param(jnp.asarray(part)) for part in np.split(joint, 3)])
        self.out = Dense(read, f"{name}.attention.out_proj", size, size)
        self.norm, self.mlp = Norm(read, f"{name}.layernorm", config), FeedForward(read, f"{name}.mlp", config)

    def __call__(self, x_bpd: Array) -> Array:
        """(b, d)"""
        probe_b1d = jnp.broadcast_to(self.probe[...], (len(x_bpd), 1, x_bpd.shape[-1]))
        inputs = (probe_b1d, x_bpd, x_bpd)
        q, k, v = (a @ w[...] + b[...] for a, w, b in zip(inputs, self.weights, self.biases, strict=True))
        y_b1d = self.out(heads_attend(q, k, v, self.heads))
        return (y_b1d + self.mlp(self.norm(y_b1d)))[:, 0]


def heads_attend(q_bpd: Array, k_bpd: Array, v_bpd: Array, heads: int) -> Array:
    """Attention of all to all, by heads."""
    apart = (a.reshape(*a.shape[:2], heads, -1) for a in (q_bpd, k_bpd, v_bpd))
    return attend_all(*apart).reshape(q_bpd.shape)
