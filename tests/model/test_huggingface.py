"""Whole models and single layers against transformers 5.23 (fixtures/models: float32, random weights).

Those of nemotron_h set time_step_min to 1e-12, so that transformers' clamp of dt at that value does nothing.
Letters: b batch, t time, d model, v vocabulary, l layers.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tests.model.tensors import layer_values, module, values

from orogen.checkpoint.open import open_model
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.convert.config import read_config
from orogen.layers.documents import documents
from orogen.model.block import Layer
from orogen.parallel.plan import make_plan

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "models"
MOE = ("nemotron_h_moe", "nemotron_h_moe_latent")
NEMOTRON = ("nemotron_h_dense", *MOE)
NAMES = (*NEMOTRON, "mamba", "mamba2", "deepseek_v3", "mixtral", "qwen2_moe")
LENGTHS = (1, 5, 16, 17, 37, 48)  # around a chunk of 16
PADDED = 2 * len(LENGTHS)  # the first row that is padded on the left


@functools.cache
def read(name: str) -> tuple[ModelConfig, dict, dict]:
    """The configuration, the checkpoint's tensors and the reference's arrays."""
    _, config = stored(name)
    return config, load_file(FIXTURES / name / "model.safetensors"), dict(np.load(FIXTURES / name / "ref.npz"))


def stored(name: str) -> tuple[str, ModelConfig]:
    """The family and the configuration."""
    return read_config(json.loads((FIXTURES / name / "config.json").read_text()), mtp=False)


@functools.cache
def built(name: str):
    """The graph, parameters and buffers of the folder, read as any checkpoint is."""
    loaded = open_model(FIXTURES / name)
    return loaded.built.graph, loaded.params, loaded.buffers


def close(actual, expected, tolerance: float) -> None:
    """Every difference within `tolerance` of the range of the expected values."""
    difference = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert difference <= tolerance * np.ptp(expected), f"{difference} of a range of {np.ptp(expected)}"


@functools.cache
def answers(name: str) -> tuple[jax.Array, jax.Array, nnx.State]:
    """The cross-entropy of the rows of 37 tokens; logits of all lengths (two rows each, padded) and, in the rows after
    them, of the left-padded rows; gradients."""
    graph, params, buffers = built(name)
    arrays, plan = read(name)[2], make_plan(PlanConfig(), read(name)[0])
    padded_bt = arrays["pad_ids"]
    tokens_bt = np.zeros((PADDED + len(padded_bt), max(LENGTHS)), np.int32)
    segments_bt = np.zeros_like(tokens_bt)
    tokens_bt[PADDED:, : padded_bt.shape[1]] = padded_bt
    segments_bt[PADDED:, : padded_bt.shape[1]] = arrays["pad_mask"]
    for row, length in enumerate(LENGTHS):
        tokens_bt[2 * row : 2 * row + 2, :length] = arrays[f"ids_{length}"]
        segments_bt[2 * row : 2 * row + 2, :length] = 1
    rows = 2 * LENGTHS.index(37) + np.arange(2)[:, None]

    def loss(params):
        logits_btv = nnx.merge(graph, params, buffers).logits(tokens_bt, documents(segments_bt), plan)
        likelihood_btv = jax.nn.log_softmax(logits_btv[rows, np.arange(36)])
        return -jnp.take_along_axis(likelihood_btv, tokens_bt[rows, np.arange(1, 37)][..., None], -1).mean(), logits_btv

    (value, logits_btv), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, logits_btv, grads


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_at_every_length(name):
    logits_btv = answers(name)[1]
    for row, length in enumerate(LENGTHS):
        close(logits_btv[2 * row : 2 * row + 2, :length], read(name)[2][f"logits_{length}"], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient_equal_transformers(name):
    value, _, grads = answers(name)
    np.testing.assert_allclose(value, read(name)[2]["loss_37"], rtol=1e-6)
    expected = values(load_file(FIXTURES / name / "grads_37.safetensors"), read(name)[0], stored(name)[0])
    checked = dict(nnx.to_flat_state(grads))
    assert checked.keys() == {path for path in expected if path[-2:] != ("router", "bias")}
    for path, variable in checked.items():
        error = np.linalg.norm(variable.get_value() - expected[path]) / np.linalg.norm(expected[path])
        assert error < 1e-4, f"{path}: {error}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mamba"])
def test_logits_of_left_padded_rows_equal_transformers(name):
    """Padding in front reaches neither convolution, state, attention nor positions. In transformers it does in mamba's
    fixture: the bias of in_proj is added after the mask, and the convolution sees it."""
    arrays = read(name)[2]
    mask_bt = arrays["pad_mask"]
    assert (mask_bt[:, 0] == 0).any() and mask_bt[:, -1].all()
    logits_btv = answers(name)[1][PADDED:, : mask_bt.shape[1]]
    close(logits_btv[mask_bt == 1], arrays["pad_logits"][mask_bt == 1], 1e-5)


def test_logits_of_a_single_token_equal_transformers():
    graph, params, buffers = built("nemotron_h_moe")
    config, _, arrays = read("nemotron_h_moe")
    plan = make_plan(PlanConfig(), config)
    run = jax.jit(lambda tokens, segments: nnx.merge(graph, params, buffers).logits(tokens, documents(segments), plan))
    close(run(arrays["ids_1"].astype(np.int32), np.ones((2, 1), np.int32)), arrays["logits_1"], 1e-5)


@functools.cache
def layer_function(name: str, letter: str):
    config, plan = read(name)[0], make_plan(PlanConfig(), read(name)[0])
    graph, _ = nnx.split(jax.eval_shape(lambda: Layer(letter, config, nnx.Rngs(0))))
    return jax.jit(lambda state, x_btd, segments_bt: nnx.merge(graph, state)(x_btd, documents(segments_bt), plan, None))


@pytest.mark.parametrize("name", NEMOTRON)
def test_each_layer_equals_transformers(name):
    config, tensors, arrays = read(name)
    stream_lbtd = np.concatenate([arrays["embed_37"][None], arrays["hidden_37"]])
    segments_bt = np.ones((2, 37), np.int32)
    routers = 0
    assert len(config.layers.main) == len(arrays["hidden_37"])
    for number, letter in enumerate(config.layers.main):
        found = layer_values(tensors, config, letter, f"backbone.layers.{number}")
        layer = module(lambda letter=letter: Layer(letter, config, nnx.Rngs(0)), found)
        state = nnx.state(layer)
        x_btd, stats = layer_function(name, letter)(state, stream_lbtd[number], segments_bt)
        close(x_btd - stream_lbtd[number], stream_lbtd[number + 1] - stream_lbtd[number], 1e-5)
        if letter == "E":
            ids_nk = arrays[f"router{routers}_out2"]
            np.testing.assert_array_equal(np.sort(stats.choice.replay.experts.reshape(ids_nk.shape)), np.sort(ids_nk))
            routers += 1
    assert routers == config.layers.main.count("E")


@pytest.mark.parametrize("name", MOE)
def test_router_weights_equal_transformers(name):
    config, tensors, arrays = read(name)
    stream_lbtd = np.concatenate([arrays["embed_37"][None], arrays["hidden_37"]])
    plan = make_plan(PlanConfig(), config)
    numbers = [number for number, letter in enumerate(config.layers.main) if letter == "E"]
    for index, number in enumerate(numbers):
        found = layer_values(tensors, config, "E", f"backbone.layers.{number}")
        layer = module(lambda: Layer("E", config, nnx.Rngs(0)), found)
        _, routing = layer.mixer.router(layer.norm(jnp.asarray(stream_lbtd[number]), plan), plan, None)
        weights, ids = (arrays[f"router{index}_out{i}"] for i in (1, 2))
        order, reference = np.argsort(routing.experts.reshape(ids.shape)), np.argsort(ids)
        ours = np.take_along_axis(np.asarray(routing.weights).reshape(ids.shape), order, 1)
        np.testing.assert_allclose(ours, np.take_along_axis(weights, reference, 1), rtol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_table_reads_every_tensor_whole(name):
    config, tensors, _ = read(name)
    elements = sum(value.size for value in values(tensors, config, stored(name)[0]).values())
    assert elements == sum(tensor.size for tensor in tensors.values())
