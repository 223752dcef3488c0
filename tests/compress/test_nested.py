"""Submodels by masks are submodels by slices, to the bit; units in another order compute the same.

A sum has the same bits with and without exact zeros if it adds in the same order. XLA:CPU does so operation by
operation for the widths here, multiples of 32 where sums go over them; it has other kernels for some other shapes, and
a compiled program may fuse differently for each shape.
Shapes differ in every dimension.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tests.compress.test_prune import MODEL, OTHER, SIZES, save

from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.checkpoint.open import open_folder, open_model
from orogen.compress.nested import LAYERS, Nesting
from orogen.compress.prune import decide, random_found
from orogen.compress.rewrite import Source, rewrite
from orogen.compress.slices import Pruned
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.layers.documents import Documents, numbered
from orogen.moe.layer import MoE
from orogen.moe.router import global_balance
from orogen.parallel.plan import make_plan

# Two documents and padding in the first row.
SEGMENTS_BT = np.array([[1] * 8 + [2] * 8 + [0] * 3, [1] * 19])
TOKENS_BT = np.random.default_rng(1).integers(0, 259, SEGMENTS_BT.shape)
# Three of each key head's five query heads stay, some of four Mamba heads of each group, two of three experts.
WIDE = ModelConfig(
    pattern="M*E-", vocab_size=259, hidden_size=96, num_attention_heads=10, num_key_value_heads=2, head_dim=32,
    attention_bias="all", qk_norm=True, attention_sinks=True, rope_theta=1e4, intermediate_size=160, mlp_bias=True,
    moe_bias="shared", mamba_num_heads=12, mamba_head_dim=16, n_groups=3, ssm_state_size=7, chunk_size=8,
    mamba_proj_bias=True, n_routed_experts=9, n_group=3, topk_group=2, num_experts_per_tok=3, moe_intermediate_size=96,
    moe_shared_expert_intermediate_size=128, moe_latent_size=64,
)  # fmt: skip
# Latent attention, a window, Mamba-1, gated experts without a latent, tied embeddings, learned positions.
REST = ModelConfig(
    pattern="+wmE", vocab_size=259, hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    sliding_window=5, kv_lora_rank=9, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=32,
    rope_theta=1e4, mamba_intermediate_size=12, time_step_rank=3, ssm_state_size=4, mlp_gated=True, mlp_bias=True,
    mlp_hidden_act="silu", n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, router_score="softmax",
    tie_word_embeddings=True, learned_positions=64,
)  # fmt: skip
# The number of Mamba heads whose sums have the same bits is one for jax 0.10.1 and another for 0.11.2.
HEADS, OTHER_HEADS = (6, 9) if jax.__version_info__ < (0, 11) else (9, 6)
CASES = {
    "stream, heads and depth": (WIDE, {"hidden_size": 64, "num_attention_heads": 6, LAYERS: 3}),
    "other widths": (
        WIDE,
        {"mamba_num_heads": HEADS, "intermediate_size": 96, "n_routed_experts": 6,
         "moe_shared_expert_intermediate_size": 32},
    ),
}  # fmt: skip
# Here XLA:CPU has other kernels for the smaller shapes: products of groups, the SSD, and matrices of few columns.
INEXACT = {
    "Mamba heads": (WIDE, {"mamba_num_heads": OTHER_HEADS}),
    "heads and experts": (WIDE, {"mamba_head_dim": 8, "moe_intermediate_size": 64, "moe_latent_size": 32}),
    "other letters": (REST, {"hidden_size": 64, "num_attention_heads": 2, "n_routed_experts": 5}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By model, a checkpoint folder. Experts that are absent later, the last of each three, have the largest biases."""

    def plant(name, array):
        if name.endswith("router.bias"):
            array[2::3] = 9
        return array

    made = tmp_path_factory.mktemp("models")
    return {model: save(made / model.pattern, model, plant) for model in (WIDE, REST)}


def nesting(model, sizes):
    whole = {field: len(model.layers.main) if field == LAYERS else getattr(model, field) for field in sizes}
    return Nesting(
        model, {field: (size, whole[field]) for field, size in sizes.items()}, (3, 1) if LAYERS in sizes else ()
    )


def sliced(folder, settings, target):
    with open_folder(folder) as before:
        choice = decide(before.config, settings, random_found(before.config, settings), PlanConfig())
        source = Source(before)
        rewrite(source, Pruned(source, choice.kept), choice.config, folder, target)
    return open_model(target)


def logits(opened, params, *, nested=False):
    """Of the tokens that are no padding, operation by operation."""
    plan = dataclasses.replace(opened.plan, nested=nested)
    positions_bt = jnp.tile(jnp.arange(19), (2, 1))
    with jax.disable_jit():
        model = nnx.merge(opened.built.graph, params, opened.buffers)
        docs = Documents(jnp.asarray(numbered(SEGMENTS_BT)), positions_bt)
        return np.asarray(model.logits(jnp.asarray(TOKENS_BT), docs, plan))[SEGMENTS_BT > 0]


def both(folder, model, sizes, target):
    """Logits of a submodel by masks and by slices."""
    nested, opened = nesting(model, sizes), open_model(folder)
    small = sliced(folder, nested.settings(sizes), target)
    by_slices = logits(small, small.params)
    assert np.ptp(by_slices) > 1
    return logits(opened, nested.masked(opened.params, nested.picks(sizes)), nested=True), by_slices


@pytest.mark.parametrize("case", CASES)
def test_masks_and_slices_have_the_same_logits(folders, tmp_path, case):
    model, sizes = CASES[case]
    np.testing.assert_array_equal(*both(folders[model], model, sizes, tmp_path / "small"))


@pytest.mark.parametrize("case", INEXACT)
def test_other_shapes_differ_by_rounding_alone(folders, tmp_path, case):
    model, sizes = INEXACT[case]
    by_masks, by_slices = both(folders[model], model, sizes, tmp_path / "small")
    np.testing.assert_allclose(by_masks, by_slices, atol=2e-6 * np.ptp(by_slices))


def test_the_whole_model_keeps_its_logits_and_so_does_another_order_of_units(folders, tmp_path):
    """By masks to the bit; sorted by random scores up to rounding."""
    sizes = {field for _, fields in CASES.values() for field in fields if field != LAYERS} | {
        "mamba_head_dim",
        "moe_latent_size",
    }
    nested, opened = nesting(WIDE, {LAYERS: 2, "hidden_size": 64}), open_model(folders[WIDE])
    before = logits(opened, opened.params)
    whole = nested.masked(opened.params, nested.picks({}))
    np.testing.assert_array_equal(logits(opened, whole, nested=True), before)
    own = {field: getattr(WIDE, field) for field in sizes}
    turned = sliced(folders[WIDE], PruneConfig(**own, width_scores="random"), tmp_path / "turned")
    weights: Any = [leaves_of(one.params)["norm", "weight"].get_value() for one in (turned, opened)]
    assert turned.config == WIDE and not np.array_equal(*weights)
    np.testing.assert_allclose(logits(turned, turned.params), before, atol=2e-6 * np.ptp(before))


@pytest.mark.parametrize("balance", ["row", "global"])
def test_losses_of_routers_are_those_of_the_slice(balance):
    """Of 8 of 12 experts; a layer that is removed has none."""
    config = ModelConfig(
        pattern="E", vocab_size=259, hidden_size=16, n_routed_experts=12, num_experts_per_tok=3,
        moe_intermediate_size=8, router_balance=balance,
    )  # fmt: skip
    random = np.random.default_rng(2)
    x_btd, gate = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((2, 19, 16), (16, 12)))
    docs = Documents(jnp.asarray(numbered(SEGMENTS_BT)), jnp.tile(jnp.arange(19), (2, 1)))

    def losses(gate, *, nested=True):
        config_of = dataclasses.replace(config, n_routed_experts=gate.shape[1])
        layer, plan = MoE(config_of, nnx.Rngs(0)), make_plan(PlanConfig(), config_of)
        layer.router.gate.set_value(gate)
        balanced, z = layer(x_btd, docs, dataclasses.replace(plan, nested=nested))[1].losses
        if balance == "global":
            balanced = global_balance(*balanced, jnp.asarray(35.0), k=3)
        return jnp.stack([balanced, z])

    by_slices = losses(gate[:, :8], nested=False)
    assert (by_slices > 1).all()
    np.testing.assert_allclose(losses(gate * (np.arange(12) < 8)), by_slices, rtol=1e-6)
    np.testing.assert_array_equal(losses(gate), losses(gate, nested=False))
    removed, back = jax.vjp(losses, gate.at[0].set(0))
    assert (removed == 0).all() and (back(jnp.ones(2))[0] == 0).all()


ODD = dataclasses.replace(MODEL, layer_norm_epsilon=1e-5)
WIDTHS = {field: size for field, size in SIZES.items() if field != "num_key_value_heads"}
OTHER_SIZES = {"num_attention_heads": 5, "n_routed_experts": 4, "moe_intermediate_size": 9}


@pytest.mark.parametrize(("model", "sizes"), [(ODD, WIDTHS), (OTHER, OTHER_SIZES)], ids=["ODD", "OTHER"])
def test_what_a_mask_leaves_has_the_bits_of_the_slice(tmp_path, model, sizes):
    """Repetitions, an MTP block and odd sizes: without the rows and columns of zeros, the parameters are those of the
    slice, the weights of norms included."""
    folder, nested = save(tmp_path / "model", model), nesting(model, sizes)
    opened = open_model(folder)
    found = leaves_of(nested.masked(opened.params, nested.picks(sizes)))
    sliced(folder, nested.settings(sizes), tmp_path / "small")
    arrays = load_file(tmp_path / "small" / "model.safetensors")
    assert len(found) > 20
    for path, leaf in found.items():
        left = np.asarray(leaf.get_value())
        for axis in range(left.ndim):
            others = tuple(other for other in range(left.ndim) if other != axis)
            left = np.compress(np.any(left != 0, axis=others), left, axis=axis)
        np.testing.assert_array_equal(left, arrays[dotted(path)], err_msg=dotted(path))
