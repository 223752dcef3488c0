"""Weights that stay in FP8 in memory: the numbers of decoded ones, in half the bytes of bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.convert.quantised import CASES, modelopt_fp8, modelopt_nvfp4, plain, short
from tests.infer.engines import asked, check_greedy, random_prompt

from orogen.checkpoint.open import held_share, open_folder, read_model
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.plan import PlanConfig
from orogen.infer.engine import Engine
from orogen.precision.scaled import Scaled


def leaves(opened):
    return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(opened.params)}


def both(folder, plan, dtype):
    with open_folder(folder) as there:
        return tuple(read_model(there, plan, dtype, tokenizer=False, weights=weights) for weights in ("decoded", "fp8"))


SPLIT = PlanConfig(tensor=2, expert_tensor=2, dispatch="allgather")


@pytest.mark.parametrize(
    ("name", "plan"),
    [("nano FP8", SPLIT), ("compressed by channel", None), ("compressed by block", SPLIT), ("stacked FP8", None)],
)
def test_they_are_the_decoded_numbers(tmp_path, name, plan):
    CASES[name]().write(tmp_path / "hf")
    decoded, held = map(leaves, both(tmp_path / "hf", plan, "float32"))
    eights = {path for path, value in held.items() if isinstance(value, Scaled)}
    assert eights and all("mixer" in path and "router" not in path for path in eights)
    for path, value in decoded.items():
        if path in eights:
            assert held[path].values.dtype == jnp.float8_e4m3fn
            assert held[path].values.sharding == held[path].scale.sharding == value.sharding
            scale = np.asarray(held[path].scale)
            spread = np.repeat(scale, value.shape[-2] // scale.shape[-2], axis=-2)
            numbers = np.asarray(held[path].values).astype(np.float32) * spread
            np.testing.assert_array_equal(numbers, value, err_msg=str(path))
        else:
            np.testing.assert_array_equal(held[path], value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("short")
    short(modelopt_fp8, "FP8").write(root / "hf")
    return root / "hf"


def test_an_engine_answers_alike_from_fewer_bytes(folder):
    requests = [asked(random_prompt(seed, length, 96), 6) for seed, length in ((1, 5), (2, 9))]
    decoded, held = both(folder, PlanConfig(), "float32")
    config = EngineConfig(slots=2, max_length=32, page=8, chunk=8, prefill_tokens=16, prefix_cache=False)
    engine = Engine(held, config, release=True)
    check_greedy(decoded, requests, engine.run(requests), 32)
    sizes = [sum(a.nbytes for a in jax.tree.leaves(opened.params)) for opened in (decoded, engine.opened)]
    with open_folder(folder) as there:
        flat = leaves(read_model(there, tokenizer=False, weights="fp8"))
    matrices = sum(value.values.size for value in flat.values() if isinstance(value, Scaled))
    scales = sum(value.scale.nbytes for value in flat.values() if isinstance(value, Scaled))
    assert sizes[0] - sizes[1] == 3 * matrices - scales
    with open_folder(folder) as there:
        whole = sum(value.size for value in flat.values() if not isinstance(value, Scaled)) + matrices
        whole += 6  # the router's correction bias, which is a buffer
        assert held_share(there, "bfloat16") == pytest.approx((2 * whole - matrices) / (2 * whole))


def test_one_weight_is_decoded_at_a_time():
    """A program with a loop over products with four weights has room for one or two of them in float32."""
    size = 256
    x, values = jnp.zeros((2, size)), [jnp.ones((size, size), jnp.float8_e4m3fn) for _ in range(4)]

    def products(x, values):
        step = lambda _, x: functools.reduce(lambda x, v: x @ Scaled(v, jnp.ones((1, size))).decoded(x), values, x)  # noqa: E731
        return jax.lax.fori_loop(0, x.shape[0] + values[0].shape[0], step, x)

    memory = jax.jit(products).lower(x, values).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (4 + 4) * size * size + 50_000  # numbers of 8 bits, and one weight


def test_commands_take_it(folder, capsys):
    bindings = ["--gin_bindings", "EngineConfig.weights='fp8'", "--tokens", "3", "--temperature", "0"]
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "a", *bindings]) == 2
    assert "tokenizer" in capsys.readouterr().err  # the folder has none; its weights are not to blame


def test_what_has_no_weights_in_fp8_is_refused(folder, tmp_path):
    plain().write(tmp_path / "plain")
    short(modelopt_nvfp4, "NVFP4").write(tmp_path / "four")
    for name, message in (
        ("plain", "has no weights of products in FP8"),
        ("four", "has no weights of products in FP8"),
    ):
        with open_folder(tmp_path / name) as there, pytest.raises(ConfigError, match=message):
            read_model(there, tokenizer=False, weights="fp8")
    with (
        open_folder(folder) as there,
        pytest.raises(ConfigError, match="PlanConfig.fsdp is 'parameters'; expected 'none'"),
    ):
        read_model(there, PlanConfig(data=2, fsdp="parameters"), tokenizer=False, weights="fp8")
    with pytest.raises(ConfigError, match="EngineConfig.weights is 'int8'; expected one of decoded, fp8"):
        EngineConfig(weights="int8")
