"""Multi-token prediction against megatron-core 0.20 (fixtures/megatron): hidden states, losses and all gradients.

The fixtures' 13 positions predict 13 labels, so our rows have 14 tokens. Where Megatron rolls a zero in, ours has the
last token; the positions that see it have no target at that depth.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from tests.model.small import Witness
from tests.model.tensors import fill, mtp_values, values

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.packing import Batch
from orogen.model.block import repeats
from orogen.model.lm import LanguageModel
from orogen.model.mtp import MTPBlock
from orogen.parallel.plan import make_plan
from orogen.train.loss import batch_counts, loss_share
from orogen.train.next_token import LOSS, MTP_LOSS, NEXT_TOKENS

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "megatron"
NAMES = ("mtp_depth1", "mtp_depth2_masked", "mtp_depth2_repeated")


class BlockADepth(nnx.Module):
    """Applies its blocks in turn: what Megatron does without `mtp_use_repeated_layer`."""

    def __init__(self, blocks: list[MTPBlock]):
        self.blocks = nnx.List(blocks)
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.blocks[self.calls - 1](*arguments)


@functools.cache
def read(name: str):
    """The configuration, whether blocks differ, arrays, and tensors by kind ("w", "g")."""
    arrays = dict(np.load(FIXTURES / f"{name}.npz"))
    meta = json.loads(str(arrays["meta"]))
    config = ModelConfig(
        pattern=f"{meta['pattern']}/{meta['mtp_pattern']}", vocab_size=64, hidden_size=32,
        layer_norm_epsilon=meta["eps"], num_attention_heads=meta["heads"], num_key_value_heads=meta["kv"],
        head_dim=meta["head_dim"], intermediate_size=meta["ffn"], mtp_depths=meta["mtp_num_layers"],
        mtp_loss_scale=meta["mtp_loss_scaling_factor"],
    )  # fmt: skip
    apart = meta["mtp_num_layers"] > 1 and not meta.get("mtp_use_repeated_layer", False)
    tensors = {kind: {k[2:]: v for k, v in arrays.items() if k.startswith(f"{kind}:")} for kind in "wg"}
    return config, apart, arrays, tensors


def by_path(name: str, kind: str) -> dict:
    config, apart, _, tensors = read(name)
    found = values(tensors[kind], config)
    if apart:
        found = {path: value for path, value in found.items() if path[0] != "mtp"}
        for depth in range(config.mtp_depths):
            block = mtp_values(tensors[kind], config, depth)
            found |= {("mtp", "blocks", depth, *path): value for path, value in block.items()}
    return found


def model_of(config: ModelConfig, apart: bool) -> LanguageModel:
    model = LanguageModel(config, nnx.Rngs(0))
    if apart:
        model.mtp = BlockADepth(
            [MTPBlock(config, nnx.Rngs(depth), repeats(config.layers.mtp)) for depth in range(config.mtp_depths)]
        )
    return model


@functools.cache
def answers(name: str):
    config, apart, arrays, _ = read(name)
    plan = make_plan(PlanConfig(), config)
    graph, params = nnx.split(jax.eval_shape(lambda: model_of(config, apart)))
    params = fill(params, by_path(name, "w"))
    tokens_bt = np.concatenate([arrays["ids"], arrays["labels"][:, -1:]], 1).astype(np.int32)
    weights_bt = np.concatenate([np.zeros((2, 1)), arrays["loss_mask"]], 1).astype(np.float32)
    ones_bt = np.ones_like(tokens_bt)
    batch = Batch(tokens_bt, ones_bt, np.cumsum(ones_bt, 1) - 1, weights_bt)
    counts = batch_counts(batch, NEXT_TOKENS, config.mtp_depths, plan)

    def loss(params):
        model = Witness(nnx.merge(graph, params))
        total, sums = loss_share(model, batch, counts, objective=NEXT_TOKENS, config=config, plan=plan)
        return total, (sums, model.seen, [model.project(h_btd, plan) for h_btd in model.seen])

    (total, (sums, hidden, logits)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return total, sums.metrics, counts.metrics, hidden, logits, grads


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits_of_every_depth_equal_megatron(name):
    config, _, arrays, _ = read(name)
    _, _, _, hidden, logits, _ = answers(name)
    for depth, (h_btd, logits_btv) in enumerate(zip(hidden, logits, strict=True)):
        valid = 13 - depth  # later positions see the token that Megatron rolls in
        expected = arrays[f"mtp{depth - 1}_hidden" if depth else "decoder_hidden"][:, :valid]
        np.testing.assert_allclose(h_btd[:, :valid], expected, rtol=1e-4, atol=2e-5)
        expected = arrays[f"mtp{depth - 1}_logits" if depth else "logits"][:, :valid]
        np.testing.assert_allclose(logits_btv[:, :valid], expected, rtol=1e-4, atol=1e-4)
    assert len(hidden) == 1 + config.mtp_depths


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_counts_of_every_depth_equal_megatron(name):
    config, _, arrays, _ = read(name)
    total, sums, counts, _, _, _ = answers(name)
    found = [np.concatenate([np.ravel(values[name]) for name in (LOSS, MTP_LOSS)]) for values in (sums, counts)]
    np.testing.assert_array_equal(found[1], [arrays["loss_mask"].sum(), *arrays["logged_total_values"]])
    losses = found[0] / found[1]
    np.testing.assert_allclose(losses, [arrays["main_loss"], *arrays["logged_loss_values"]], rtol=1e-6)
    scale = config.mtp_loss_scale / config.mtp_depths
    np.testing.assert_allclose(total, losses[0] + scale * sum(losses[1:]), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_equals_megatron(name):
    expected = by_path(name, "g")
    found = dict(nnx.to_flat_state(answers(name)[-1]))
    assert found.keys() == expected.keys()
    for path, variable in found.items():
        error = np.linalg.norm(variable.get_value() - expected[path]) / np.linalg.norm(expected[path])
        assert error < 1e-4, f"{path}: {error}"
