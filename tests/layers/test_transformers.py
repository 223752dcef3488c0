"""Norms and activations against those of transformers and torch. Letters: b batch, t time, d model."""

import jax.numpy as jnp
import numpy as np
import pytest
from tests.model.small import config, one_device

from orogen.layers.mlp import activate
from orogen.layers.norm import LayerNorm, LayerNorm1P, RMSNorm, RMSNormCastFirst

pytestmark = pytest.mark.peer
SIZE, EPSILON = 96, 1e-3


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x with a mean and uneven channels, weight and bias; all exact in bfloat16."""
    rng = np.random.default_rng(0)
    x_btd = 3 * rng.normal(size=(4, 7, SIZE)) + 0.5
    drawn = x_btd, 1 + 0.3 * rng.normal(size=SIZE), 0.2 * rng.normal(size=SIZE)
    return tuple(np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in drawn)


def test_cast_first_equals_llama_to_the_bit_in_bfloat16_and_plain_rms_does_not():
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x_btd, weight_d, _ = inputs()
    peer = LlamaRMSNorm(SIZE, eps=EPSILON).to(torch.bfloat16)
    with torch.no_grad():
        peer.weight.copy_(torch.from_numpy(weight_d))
        expected = peer(torch.from_numpy(x_btd).to(torch.bfloat16)).float().numpy()
    for norm, equal in ((RMSNormCastFirst(SIZE, EPSILON), True), (RMSNorm(SIZE, EPSILON), False)):
        norm.weight[...] = jnp.asarray(weight_d)
        found = np.asarray(norm(jnp.asarray(x_btd, jnp.bfloat16), one_device(config())), np.float32)
        assert (found == expected).all() == equal
        np.testing.assert_allclose(found, expected, rtol=2**-7)


def test_layer_norm_1p_equals_nemotron():
    import torch
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    x_btd, weight_d, bias_d = inputs()
    peer, norm = NemotronLayerNorm1P(SIZE, eps=EPSILON), LayerNorm1P(SIZE, EPSILON)
    norm.weight[...], norm.bias[...] = jnp.asarray(weight_d), jnp.asarray(bias_d)
    with torch.no_grad():
        peer.weight.copy_(torch.from_numpy(weight_d))
        peer.bias.copy_(torch.from_numpy(bias_d))
        expected = peer(torch.from_numpy(x_btd)).numpy()
    close(norm(jnp.asarray(x_btd), one_device(config())), expected)


def test_layer_norm_equals_torch():
    import torch

    x_btd, weight_d, bias_d = inputs()
    norm = LayerNorm(SIZE, EPSILON)
    norm.weight[...], norm.bias[...] = jnp.asarray(weight_d), jnp.asarray(bias_d)
    weight, bias, x = (torch.from_numpy(a) for a in (weight_d, bias_d, x_btd))
    expected = torch.nn.functional.layer_norm(x, (SIZE,), weight, bias, EPSILON).numpy()
    close(norm(jnp.asarray(x_btd), one_device(config())), expected)


@pytest.mark.parametrize(
    ("name", "peer"),
    [("gelu_tanh", "gelu_new"), ("gelu", "gelu"), ("silu", "silu"), ("relu2", "relu2"), ("relu", "relu")],
)
def test_activation_equals_transformers(name, peer):
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    close(activate(jnp.asarray(x), None, name=name), ACT2FN[peer](torch.from_numpy(x)).numpy())


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
