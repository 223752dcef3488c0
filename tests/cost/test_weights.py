"""The parameters of each part of a model, as its modules create them: shapes, axes and dtypes by hand."""

import math
import random
from collections.abc import Iterable

import pytest
from tests.helpers import hybrid

from orogen.config.model import MAX_LAYERS, ModelConfig
from orogen.cost.weights import Weight, changed, weights
from orogen.model.lm import Built, build
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
    assert parts == {"embedding": (positions, tokens), "norm": (vector(D, "norm"),), **head}


def test_a_vocabulary_that_a_plan_pads():
    parts = weights(DENSE, 12).parts
    assert [parts[name][0].shape for name in ("embedding", "head")] == [(12, D), (D, 12)]


def test_the_mtp_block_without_its_layers():
    model = changed(DENSE, pattern="-/*-", mtp_depths=2, num_attention_heads=4, num_key_value_heads=2, head_dim=3)
    found = weights(model)
    same(found.mtp, [Weight((2 * D, D), (None, "embed")), *[vector(D, "norm")] * 3])
    assert set(found.layers) == set("-*")
    assert Weight((D, 6), ("embed", "kv_heads")) in found.layers["*"]


def test_a_thousand_layers_in_random_order_are_read_as_one_of_each(monkeypatch):
    traced = []

    def recorded(model: ModelConfig, **options: int | None) -> Built:
        traced.append(model.layers.main)
        return build(model, **options)

    monkeypatch.setattr("orogen.cost.weights.build", recorded)
    pattern = "".join(random.Random(0).choices("ME*-", k=MAX_LAYERS))
    one = hybrid(pattern="ME*-", mtp_depths=0)
    found = weights(changed(one, pattern=pattern))
    assert [sorted(letters) for letters in traced] == [sorted("ME*-")]
    assert found.layers == weights(one).layers and found.parts == weights(one).parts
    layers = {letter: sum(math.prod(w.shape) for w in each) for letter, each in found.layers.items()}
    difference = sum(layers[letter] for letter in pattern) - sum(layers.values())
    assert count(changed(one, pattern=pattern)) - count(one) == difference


def test_sizes_that_no_machine_holds_are_counted():
    """No numbers are drawn, so that no limit of a generator applies."""
    vast = 10**15
    model = changed(DENSE, hidden_size=vast, intermediate_size=2 * vast, vocab_size=3 * vast)
    assert count(model) == 2 * 2 * vast**2 + 2 * vast + 2 * 3 * vast**2
