"""The parameters of each part of a model: shapes, axes and dtypes by hand, and as its modules create them."""

import math
import random
from collections.abc import Iterable
from typing import Any

import jax
import pytest
from flax import nnx
from tests.helpers import hybrid

from orogen.config.checks import field_types
from orogen.config.kinds import LAYERS, reading
from orogen.config.load import load
from orogen.config.model import MAX_LAYERS, ModelConfig
from orogen.config.shipped import SHIPPED
from orogen.cost.weight import Weight
from orogen.cost.weights import changed, weights
from orogen.model.lm import build
from orogen.simulate.fit import count

D, F, V = 5, 7, 11
DENSE = ModelConfig(pattern="-", vocab_size=V, hidden_size=D, intermediate_size=F)


def vector(size: int, axis: str | None) -> Weight:
    return Weight((size,), (axis,), float32=True)


def same(found: Iterable[Weight], expected: Iterable[Weight]) -> None:
    """Equal, in any order."""
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_gated_mlp_with_biases():
    model = changed(DENSE, mlp_gated=True, mlp_bias=True, norm="layer")
    inward, outward = Weight((D, F), ("embed", "mlp")), Weight((F, D), ("mlp", "embed"))
    biases = [vector(F, "mlp"), vector(F, "mlp"), vector(D, "norm")]
    same(weights(model).layers["-"], [inward, inward, outward, *biases, vector(D, "norm"), vector(D, "norm")])


def test_experts_share_their_matrices_axes_and_the_router_stays_in_float32():
    sizes = {"n_routed_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 13, "moe_latent_size": 4}
    model = ModelConfig(pattern="E", vocab_size=V, hidden_size=D, router_bias=True, **sizes)
    same(
        weights(model).layers["E"],
        [
            Weight((D, 9), ("embed", None), float32=True),
            vector(9, None),
            Weight((9, 4, 13), ("expert", "expert_embed", "expert_mlp")),
            Weight((9, 13, 4), ("expert", "expert_mlp", "expert_embed")),
            Weight((D, 4), ("embed", None)),
            Weight((4, D), (None, "embed")),
            vector(D, "norm"),
        ],
    )  # the router's correction is a buffer


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_norm_and_head(tied):
    parts = weights(changed(DENSE, tie_word_embeddings=tied, learned_positions=3)).parts
    head = {} if tied else {"head": (Weight((D, V), ("embed", "vocab")),)}
    positions, tokens = Weight((3, D), ("positions", "embed")), Weight((V, D), ("vocab", "embed"))
    assert parts == {"embedding": (tokens, positions), "norm": (vector(D, "norm"),), **head}


def test_a_vocabulary_that_a_plan_pads():
    parts = weights(DENSE, 12).parts
    assert [parts[name][0].shape for name in ("embedding", "head")] == [(12, D), (D, 12)]


def test_the_mtp_block_without_its_layers():
    model = changed(DENSE, pattern="-/*-", mtp_depths=2, num_attention_heads=4, num_key_value_heads=2, head_dim=3)
    found = weights(model)
    same(found.mtp, [Weight((2 * D, D), (None, "embed")), *[vector(D, "norm")] * 3])
    assert set(found.layers) == set("-*")
    assert Weight((D, 6), ("embed", "kv_heads")) in found.layers["*"]


def test_a_thousand_layers_count_as_often_as_they_occur():
    pattern = "".join(random.Random(0).choices("ME*-", k=MAX_LAYERS))
    one = hybrid(pattern="ME*-", mtp_depths=0)
    found = weights(changed(one, pattern=pattern))
    assert found.layers == weights(one).layers and found.parts == weights(one).parts
    layers = {letter: sum(math.prod(w.shape) for w in each) for letter, each in found.layers.items()}
    difference = sum(layers[letter] for letter in pattern) - sum(layers.values())
    assert count(changed(one, pattern=pattern)) - count(one) == difference


OPTIONS = [
    {"pattern": "M", "mamba_proj_bias": True, "use_conv_bias": False},
    {"pattern": "m", "mamba_intermediate_size": 20, "time_step_rank": 3, "mamba_proj_bias": True},
    {"pattern": "m", "mamba_intermediate_size": 20, "time_step_rank": 3, "use_conv_bias": False},
    {"pattern": "*-", "attention_bias": "qkv", "qk_norm": True, "norm": "layer", "mlp_bias": True, "mlp_gated": True},
    {"pattern": "w-", "attention_bias": "all", "attention_sinks": True, "sliding_window": 3},
    {"pattern": "E", "mlp_bias": True, "mlp_gated": True, "router_bias": True, "moe_latent_size": None},
    {"pattern": "E", "mlp_bias": True, "moe_bias": "shared", "moe_latent_size": 6, "moe_shared_expert_gate": True},
    {"pattern": "-", "tie_word_embeddings": True, "learned_positions": 9, "score_head": True},
    *(
        {"pattern": "xg", "image_feature_size": 7, "image_features": 3, "resampler_latents": 5, "resampler_layers": 2,
         **captions}
        for captions in ({}, {"retrieved_captions": 2, "caption_tokens": 11})
    ),
    *(
        {"pattern": "+", "attention_bias": bias, "q_lora_rank": rank, "kv_lora_rank": 7, "qk_nope_head_dim": 5,
         "qk_rope_head_dim": 4, "v_head_dim": 3, "rope_theta": 1e4}
        for bias, rank in (("none", None), ("all", None), ("all", 11))
    ),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))[:40])
def test_each_option_gives_what_the_modules_create(options):
    same_as_modules(hybrid(**{"mtp_depths": 0, **options}))


# A model of every letter with each size that it may have, no two alike where they need not be.
EVERY = hybrid(
    pattern="".join(LAYERS), mtp_depths=0, sliding_window=3, mamba_intermediate_size=20, time_step_rank=3,
    q_lora_rank=11, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=3, rope_theta=1e4,
    image_feature_size=7, image_features=3, resampler_latents=5, resampler_layers=1, mlp_bias=True,
)  # fmt: skip
WORDS = {
    "attention_bias": "all", "moe_bias": "shared", "mlp_hidden_act": "relu", "router_score": "softmax",
    "router_balance": "global", "norm": "layer",
}  # fmt: skip
# Of floats no shape depends; rotary positions have no parameters, and a factor of YaRN needs others.
SHAPELESS = {"yarn_factor", "yarn_original_positions", "yarn_mscale", "yarn_mscale_all_dim", "swiglu_limit",
             "time_step_min", "time_step_max", "mamba_norm_groups"}  # fmt: skip


def other_value(field: str) -> Any:
    """Another value of a field of EVERY."""
    value, kind = getattr(EVERY, field), field_types(ModelConfig)[field]
    if kind is str:
        return WORDS[field]
    return not value if kind is bool else 2 * (value or 4)


@pytest.mark.parametrize(
    "field",
    sorted(
        {"hidden_size", "norm"}
        | {
            field
            for kind in LAYERS.values()
            for field in f"{kind.needs} {kind.reads}".split()
            if field_types(ModelConfig)[field] is not float and field not in SHAPELESS
        }
    ),
)
def test_each_field_that_a_letter_reads_changes_what_it_changes_in_the_modules(field):
    """Also of fields that no option above has: a new letter's are here as soon as its row names them."""
    pattern = reading(field) or EVERY.pattern
    more = {"caption_tokens": 6} if field == "retrieved_captions" else {"retrieved_captions": 2}
    more = more if field in ("retrieved_captions", "caption_tokens") else {}
    same_as_modules(changed(EVERY, pattern=pattern, **more, **{field: other_value(field)}))


@pytest.mark.parametrize("file", sorted((SHIPPED / "models").glob("*.gin")), ids=lambda file: file.stem)
def test_shipped_models_are_what_the_modules_create(file):
    same_as_modules(load([file])[0].model)


def same_as_modules(model: ModelConfig) -> None:
    """Compares `weights` with the parameters of the abstract modules, one layer of each kind."""
    letters = "".join(dict.fromkeys(model.layers.main + model.layers.mtp))
    once = changed(model, pattern=letters + ("/" + letters[0] if model.layers.mtp else ""))
    parts: dict[str, Any] = dict(build(once).params)
    layers = parts.pop("backbone")["children"]
    block = {name: part for name, part in parts.pop("mtp", {}).items() if name != "layers"}
    found = weights(model)
    assert list(found.layers) == list(letters) and set(found.parts) == set(parts)
    for index, letter in enumerate(letters):
        same(found.layers[letter], leaves(layers[index]))
    for name, part in parts.items():
        same(found.parts[name], leaves(part))
    same(found.mtp, leaves(block))


def leaves(tree: Any) -> list[Weight]:
    """The parameters of a module."""
    found = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [Weight(v.get_value().shape, v.get_metadata()["axes"], v.get_metadata()["float32"]) for v in found]


def test_sizes_that_no_machine_holds_are_counted():
    """No numbers are drawn, so that no limit of a generator applies."""
    vast = 10**15
    model = changed(DENSE, hidden_size=vast, intermediate_size=2 * vast, vocab_size=3 * vast)
    assert count(model) == 2 * 2 * vast**2 + 2 * vast + 2 * 3 * vast**2
