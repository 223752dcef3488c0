"""The options of both Mambas, by hand and against transformers: biases, limits of the step, norm groups.

Letters: b batch, t time, d model.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.model.small import config as small
from tests.model.small import one_device
from tests.model.small import randomised as drawn
from tests.model.tensors import fill, values

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.layers.documents import documents
from orogen.model.lm import build
from orogen.model.mamba1 import Mamba1
from orogen.model.mamba2 import Mamba2
from orogen.parallel.plan import make_plan
from orogen.precision.policy import working_copy

SIZES = {"vocab_size": 30, "hidden_size": 24, "conv_kernel": 3}
LIMITS = (0.02, 0.3)
TOKENS_BT = np.random.default_rng(0).integers(0, 30, (2, 19))

MIXERS = {"m": Mamba1, "M": Mamba2}
INPUT_BIASES = {"m": {"x": "x_bias", "z": "z_bias"}, "M": {n: f"{n}_bias" for n in ("z", "x", "B", "C")}}
INPUT_BIASES["M"]["dt"] = "dt_proj_bias"


def state_of(letter: str, config: ModelConfig) -> tuple[nnx.GraphDef, dict]:
    """The graph of a mixer, and random parameters by path."""
    graph, state = nnx.split(jax.eval_shape(lambda: MIXERS[letter](config, nnx.Rngs(0))))
    return graph, dict(nnx.to_flat_state(drawn(state, np.random.default_rng(1))))


def apply(graph: nnx.GraphDef, flat: dict, x_btd: jax.Array, config: ModelConfig) -> jax.Array:
    state = jax.tree.map(jnp.asarray, nnx.from_flat_state(list(flat.items())))
    segments_bt = jnp.array([[1, 1, 1, 1, 2, 2, 2]] * len(x_btd))
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, documents(segments_bt), one_device(config))[0])
    return run(state, x_btd)


@pytest.mark.parametrize("letter", "mM")
def test_a_bias_is_a_row_of_weights_for_a_constant_input(letter: str):
    biased, plain = small(mamba_proj_bias=True), small(hidden_size=13)
    graph, flat = state_of(letter, biased)
    x_btd = jax.random.normal(jax.random.key(0), (2, 7, 12))
    got_btd = apply(graph, flat, x_btd, biased)
    wide_graph, wide = state_of(letter, plain)
    out_bias = flat.pop(("out_bias",))[...]
    for weight, bias in INPUT_BIASES[letter].items():
        rows = np.concatenate([flat[weight,][...], flat.pop((bias,))[...][None]])
        flat[weight,] = flat[weight,].replace(rows)
    flat["out",] = flat["out",].replace(np.pad(flat["out",][...], ((0, 0), (0, 1))))
    assert flat.keys() == wide.keys()
    want_btd = apply(wide_graph, flat, jnp.pad(x_btd, ((0, 0), (0, 0), (0, 1)), constant_values=1), plain)
    np.testing.assert_allclose(got_btd, want_btd[..., :12] + out_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("letter", "mM")
def test_a_convolution_without_bias_has_none(letter: str):
    graph, flat = state_of(letter, small())
    bare_graph, bare = state_of(letter, small(use_conv_bias=False))
    convolutions = {path[0] for path in flat if path[0].startswith("conv")}
    assert flat.keys() - bare.keys() == {(conv, "bias") for conv in convolutions} != set()
    zeroed = {p: v.replace(np.zeros_like(v[...])) if p[-1] == "bias" else v for p, v in flat.items()}
    x_btd = jax.random.normal(jax.random.key(0), (2, 7, 12))
    found = apply(bare_graph, {p: flat[p] for p in bare}, x_btd, small(use_conv_bias=False))
    np.testing.assert_allclose(found, apply(graph, zeroed, x_btd, small()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limits, step", [((0.0, 1e-3), 1e-3), ((20.0, None), 20.0)], ids=str)
def test_steps_of_mamba2_are_clipped(limits: tuple[float, float | None], step: float):
    """Steps all beyond a limit are as if that were the bias, and the projection zero."""
    clipped = small(time_step_min=limits[0], time_step_max=limits[1])
    graph, flat = state_of("M", clipped)
    x_btd = jax.random.normal(jax.random.key(0), (2, 7, 12))
    found = apply(graph, flat, x_btd, clipped)
    flat["dt",] = flat["dt",].replace(np.zeros_like(flat["dt",][...]))
    flat["dt_bias",] = flat["dt_bias",].replace(np.full(6, np.log(np.expm1(step)), np.float32))
    expected = apply(state_of("M", small())[0], flat, x_btd, small())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_mamba1_in_bfloat16_keeps_its_decay_rates_and_skip_in_float32():
    graph, flat = state_of("m", small())
    half = dict(nnx.to_flat_state(working_copy(nnx.from_flat_state(list(flat.items())), "bfloat16")))
    kept = {path for path, variable in half.items() if variable[...].dtype == jnp.float32}
    assert kept == {("A_log",), ("D",), ("dt_bias",), ("conv", "bias")}
    x_btd = jax.random.normal(jax.random.key(0), (2, 7, 12))
    found = apply(graph, half, x_btd.astype(jnp.bfloat16), small())
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(apply(graph, flat, x_btd, small()))
    # About ten roundings of 2**-8 on the way from x to y.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.04 * np.abs(expected).max())


def test_norm_groups_of_mamba2_are_those_of_the_config_or_its_groups():
    sizes = [state_of("M", small(mamba_norm_groups=groups))[0] for groups in (None, 2, 1)]
    assert sizes[0] == sizes[1] != sizes[2]


def randomised(model: Any) -> Any:
    """A torch model with weights of which none is special; a third of its steps outside LIMITS."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("A_log"):
                parameter.copy_(torch.log(1 + 3 * torch.rand_like(parameter)))
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.copy_(noise - 2)
            else:
                scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(noise * scale + (parameter.ndim == 1))
    return model.float().eval()


def compare(theirs: Any, config: ModelConfig) -> None:
    """Logits, the loss and every gradient of both."""
    import torch

    tokens = torch.from_numpy(TOKENS_BT)
    logits = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    arrays = lambda pick: {n: pick(p).detach().numpy() for n, p in theirs.named_parameters()}  # noqa: E731
    family = theirs.config.model_type
    built, plan = build(config), make_plan(PlanConfig(), config)
    params = fill(built.params, values(arrays(lambda p: p), config, family))

    def nats(params):
        logits_btv = nnx.merge(built.graph, params, built.buffers).logits(
            jnp.asarray(TOKENS_BT), documents(np.ones(TOKENS_BT.shape, np.int32)), plan
        )
        likelihood_btv = jax.nn.log_softmax(logits_btv[:, :-1])
        return -jnp.take_along_axis(likelihood_btv, TOKENS_BT[:, 1:, None], -1).mean(), logits_btv

    (value, logits_btv), grads = jax.jit(jax.value_and_grad(nats, has_aux=True))(params)
    expected = logits.detach().numpy()
    assert np.abs(logits_btv - expected).max() < 1e-5 * np.ptp(expected)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    gradients = values(arrays(lambda p: p.grad), config, family)
    found = dict(nnx.to_flat_state(grads))
    assert found.keys() == gradients.keys()
    for path, variable in found.items():
        error = np.linalg.norm(variable.get_value() - gradients[path]) / np.linalg.norm(gradients[path])
        assert error < 1e-4, f"{path}: {error}"


@pytest.mark.peer
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv_bias", [False, True])
def test_biases_of_mamba1(bias: bool, conv_bias: bool):
    import transformers

    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            **SIZES,
            num_hidden_layers=2,
            state_size=5,
            expand=2,
            time_step_rank=3,
            use_bias=bias,
            use_conv_bias=conv_bias,
            tie_word_embeddings=False,
        )  # fmt: skip
    )
    config = ModelConfig(
        pattern="mm", **SIZES, mamba_intermediate_size=48, time_step_rank=3, ssm_state_size=5, mamba_proj_bias=bias,
        use_conv_bias=conv_bias,
    )  # fmt: skip
    compare(randomised(theirs), config)


@pytest.mark.peer
@pytest.mark.parametrize(
    "bias, conv_bias, limits, norm_groups",
    [(True, False, LIMITS, None), (False, True, (0.0, LIMITS[1]), 1), (True, True, (LIMITS[0], float("inf")), 2)],
)
def test_options_of_mamba2(bias: bool, conv_bias: bool, limits: tuple[float, float], norm_groups: int | None):
    import transformers

    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            **SIZES,
            num_hidden_layers=2,
            state_size=5,
            num_heads=6,
            head_dim=8,
            expand=2,
            n_groups=3,
            chunk_size=8,
            use_bias=bias,
            use_conv_bias=conv_bias,
            time_step_limit=limits,
            tie_word_embeddings=False,
        )  # fmt: skip
    )
    for layer in theirs.backbone.layers:
        layer.mixer.norm.group_size = 48 // (norm_groups or 3)
    config = ModelConfig(
        pattern="MM", **SIZES, mamba_num_heads=6, mamba_head_dim=8, n_groups=3, ssm_state_size=5, chunk_size=8,
        mamba_proj_bias=bias, use_conv_bias=conv_bias, mamba_norm_groups=norm_groups,
        time_step_min=limits[0], time_step_max=None if np.isinf(limits[1]) else limits[1],
    )  # fmt: skip
    compare(randomised(theirs), config)
