"""Distribution of every initial tensor, after Megatron's table (its hybrid models).

std = sqrt(0.8 / d); projections back into the residual stream divide it by sqrt(residual layers).
"""

import functools

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.model.lm import build, initial_state

SIZE = 160
PATTERN = "MMM*-Em"
STD = (0.8 / SIZE) ** 0.5
NORMAL, OUT = scipy.stats.norm(0, STD), scipy.stats.norm(0, STD / len(PATTERN) ** 0.5)
TAPS = scipy.stats.uniform(-0.5, 1)  # U(±1 / sqrt 4)
STEP = scipy.stats.uniform(-0.2, 0.4)  # U(±1 / sqrt 25)
INPUTS = ("z", "x", "B", "C", "dt", "dt_down", "query", "key", "value", "up", "gate", "latent_down", "project")
OUTPUTS = ("out", "down", "latent_up")


@functools.cache
def parameters() -> dict:
    config = ModelConfig(
        pattern=f"{PATTERN}/*", vocab_size=70, hidden_size=SIZE, num_attention_heads=6, num_key_value_heads=3,
        head_dim=20, intermediate_size=90, mamba_num_heads=200, mamba_head_dim=2, n_groups=4, ssm_state_size=30,
        n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=50, moe_latent_size=44,
        moe_shared_expert_intermediate_size=80, mamba_intermediate_size=180, time_step_rank=25, mamba_proj_bias=True,
    )  # fmt: skip
    params, buffers = jax.device_get(jax.jit(initial_state, static_argnums=0)(config, 7))
    built = build(config)
    assert jax.tree.structure((params, buffers)) == jax.tree.structure((built.params, built.buffers))
    return {path: variable.get_value() for state in (params, buffers) for path, variable in nnx.to_flat_state(state)}


def fits(values: np.ndarray, distribution) -> bool:
    """Whether a Kolmogorov-Smirnov test leaves it possible; about one such test in ten thousand would not."""
    return scipy.stats.kstest(values.reshape(-1), distribution.cdf).pvalue > 1e-4


def expected(path):
    """The distribution of a tensor, or the constant."""
    name, parent = path[-1], path[-2] if len(path) > 1 else None
    if str(parent).startswith("conv"):
        return TAPS
    if name == "dt_up":
        return STEP
    if name.endswith("_bias"):
        return 0
    if name in INPUTS or parent in ("embedding", "head"):
        return NORMAL
    if name in OUTPUTS:
        return OUT
    return {"weight": 1, "D": 1, "bias": 0}[name]


def test_every_tensor_follows_the_table():
    normal = 0
    for path, values in parameters().items():
        if path[-1] in ("A_log", "dt_bias"):
            continue
        assert values.dtype == np.float32
        wanted = expected(path)
        if isinstance(wanted, int):
            np.testing.assert_array_equal(values, wanted, err_msg=str(path))
        else:
            normal += 1
            assert fits(values, wanted), path
    assert normal == 5 + 6 + 1 + 9 + 4 + 2 + 7 + 2 + 1 + 4  # M's three, m's, attention's, ..., MTP's


def test_decay_rates_are_uniform_from_1_to_16():
    rates = [np.exp(v) for p, v in parameters().items() if p[-1] == "A_log" and v.shape == (3, 200)]
    assert len(rates) == 1
    assert fits(rates[0], scipy.stats.uniform(1, 15))


def test_decay_rates_of_mamba1_count_from_1_in_every_channel():
    (rates_in,) = (np.exp(v) for p, v in parameters().items() if p[-1] == "A_log" and v.shape == (180, 30))
    np.testing.assert_allclose(rates_in, np.tile(np.arange(1, 31), (180, 1)), rtol=1e-6)


def test_time_steps_are_log_uniform_from_a_thousandth_to_a_tenth():
    biases = [v for p, v in parameters().items() if p[-1] == "dt_bias"]
    assert sorted(bias.shape for bias in biases) == [(3, 200), (180,)]
    for bias in biases:
        steps = np.logaddexp(0, bias.astype(np.float64))
        assert fits(np.log(steps), scipy.stats.uniform(np.log(1e-3), np.log(100)))
        assert 1e-3 * 0.999 < steps.min() < steps.max() < 0.1 * 1.001


def test_repeated_layers_experts_and_projections_differ():
    seen = {}
    for path, values in parameters().items():
        if isinstance(expected(path) if path[-1] not in ("A_log", "dt_bias") else None, int):
            continue
        per_layer = 1 if path[:3] == ("backbone", "children", 0) else 0  # the three Mamba layers are one repetition
        stacked = values.reshape(-1, *values.shape[per_layer + ("experts" in path) :])
        for part in stacked:
            key = part.reshape(-1)[:20].tobytes()
            assert key not in seen, f"{path} equals {seen[key]}"
            seen[key] = path
    assert len(seen) > 3 * 13 + 2 * 6


@pytest.mark.parametrize("seed", [7, 8])
def test_a_seed_draws_one_model(seed):
    config = ModelConfig(pattern="-", vocab_size=5, hidden_size=4, intermediate_size=3)
    draw = jax.jit(initial_state, static_argnums=0)
    same = [bool((a == b).all()) for a, b in zip(*(jax.tree.leaves(draw(config, s)) for s in (7, seed)), strict=True)]
    assert sum(same) == (6 if seed == 7 else 2)  # the two norms are ones for any seed
