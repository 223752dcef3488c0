"""The formats of a run: which layers and weights they reach, what the published recipes keep, and what is refused."""

import dataclasses
import re
from pathlib import Path

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.phases import PhaseConfig
from orogen.config.plan import PlanConfig
from orogen.config.precision import PrecisionConfig
from orogen.config.rounded import Operand, Products, check_precision, layer_products, products

ROOT = Path(__file__).resolve().parents[2] / "gin_configs"
E4M3, E5M2 = (Operand(element=e, scale="tensor") for e in ("e4m3", "e5m2"))


def of(recipe, **settings):
    return products(recipe, PrecisionConfig(recipe=recipe, **settings))


def test_operands_of_fp8_by_tensor():
    expected = Products(forward=(E4M3, E4M3), input_gradient=(E5M2, E4M3), weight_gradient=(E4M3, E5M2))
    assert of("fp8_tensorwise") == expected


def test_operands_with_powers_of_two():
    rows, square = (Operand(element="e4m3", scale="power", block=128, square=s) for s in (False, True))
    expected = Products(forward=(rows, square), input_gradient=(rows, square), weight_gradient=(rows, rows))
    assert of("fp8_blockwise") == expected
    rows = Operand(element="e4m3", scale="power", block=32)
    assert of("mxfp8") == Products(**dict.fromkeys(("forward", "input_gradient", "weight_gradient"), (rows, rows)))


def test_operands_of_nvfp4_are_those_of_its_table():
    """frontier table: activation and gradient 1 x 16, weight 16 x 16; transform and random rounding where it says."""
    plain = {"element": "e2m1", "scale": "two_level", "block": 16}
    x, w, dy = Operand(**plain), Operand(**plain, square=True), Operand(**plain, stochastic=True)
    moved_x, moved_dy = Operand(**plain, hadamard=16), Operand(**plain, hadamard=16, stochastic=True)
    assert of("nvfp4") == Products(forward=(x, w), input_gradient=(dy, w), weight_gradient=(moved_x, moved_dy))
    changed = of("nvfp4", weight_blocks="rows", hadamard=0, stochastic=("weights",), four_over_six="activations")
    w, six = Operand(**plain, stochastic=True), Operand(**plain, four_over_six=True)
    assert changed.forward == (six, w) and changed.weight_gradient == (six, Operand(**plain))


def rounded(model, **settings):
    """Per layer, the kinds that are rounded."""
    precision = PrecisionConfig(**settings)
    return [dict(layer) for layer in layer_products(precision, model)]


def test_layers_and_kinds_follow_the_recipe():
    model = hybrid(pattern="M-*E-/*", mtp_depths=1)
    found = rounded(model, recipe="mxfp8", first_layers=1, last_layers=1)
    latent = {"latent_down", "latent_up", "shared_up", "shared_down", "routed_up", "routed_down"}
    assert [set(layer) for layer in found] == [
        set(), {"dense_up", "dense_down"}, {"attention_in", "attention_out"}, latent, set(), set(),
    ]  # fmt: skip
    assert set(rounded(model, recipe="mxfp8", mtp=True)[-1]) == {"attention_in", "attention_out", "mtp_project"}
    kept = rounded(
        model, recipe="nvfp4",
        keep=("attention:plain", "mamba_out:mxfp8", "dense_down.input_gradient:plain", "routed:fp8_tensorwise"),
    )  # fmt: skip
    assert not kept[2]
    assert kept[0]["mamba_out"] == of("mxfp8") and kept[0]["mamba_in"] == of("nvfp4")
    assert kept[1]["dense_down"].input_gradient is None and kept[1]["dense_down"].forward == of("nvfp4").forward
    assert kept[3]["routed_down"] == of("fp8_tensorwise")
    assert not any(rounded(model, recipe="plain"))


def test_a_late_change_spares_what_is_kept_in_the_compute_dtype():
    model = hybrid(pattern="M*", mtp_depths=0)
    settings = {"recipe": "nvfp4", "keep": ("attention:plain", "mamba_out:mxfp8"), "switch_step": 5}
    back = layer_products(PrecisionConfig(**settings), model, switched=True)
    assert back == ((), ())
    later = layer_products(PrecisionConfig(**settings, switch_to="mxfp8"), model, switched=True)
    assert dict(later[0]) == dict.fromkeys(("mamba_in", "mamba_out"), of("mxfp8")) and not later[1]
    half = dict(layer_products(PrecisionConfig(**settings, switch_roles="forward"), model, switched=True)[0])
    assert half["mamba_in"].forward is None and half["mamba_in"].input_gradient == of("nvfp4").input_gradient


LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "rope_theta": 100.0}


def model_precision(name, model):
    config, _ = load([ROOT / "precision" / f"{name}.gin", ROOT / "models" / f"{model}.gin"])
    return config.precision, config.model


def test_published_recipes_keep_what_the_papers_say():
    found = {}
    for name, model in (
        ("nemotron_h_fp8", "nemotron_h_56b"), ("nemotron_nano2_fp8", "nemotron_nano_12b_v2"),
        ("nvfp4_12b", "nemotron_nano_12b_v2"), ("nemotron3_super_nvfp4", "nemotron3_super_120b_a12b"),
        ("mxfp8", "nemotron3_nano_30b_a3b"),
    ):  # fmt: skip
        precision, config = model_precision(name, model)
        found[name] = [bool(layer) for layer in layer_products(precision, config)]
    assert found["nemotron_h_fp8"] == [False] * 4 + [True] * 110 + [False] * 4
    assert found["nvfp4_12b"] == [False] * 2 + [True] * 52 + [False] * 8
    precision, config = model_precision("nemotron3_super_nvfp4", "nemotron3_super_120b_a12b")
    layers = layer_products(precision, config)
    assert [bool(layer) for layer in layers[:74]] == [letter != "*" for letter in config.pattern[:74]]
    assert not any(layers[74:])
    kinds = {kind for layer in layers for kind, _ in layer}
    assert kinds == {"mamba_in", "mamba_out", "routed_up", "routed_down", "shared_up", "shared_down"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "fp8_delayed"}, "recipe is 'fp8_delayed'; expected fp8_tensorwise, whose scales are"),
        ({"recipe": "fp6"}, "PrecisionConfig.recipe is 'fp6'; expected one of plain, fp8_tensorwise,"),
        ({"keep": ("head:nvfp4",)}, "expected no head: it is computed in the compute dtype"),
        ({"keep": ("mamba_side:plain",)}, "whose kind is one of dense, shared,"),
        ({"keep": ("mamba.back:plain",)}, "expected a role that is one of forward, input_gradient, weight_gradient"),
        ({"keep": ("mamba:nvfp8",)}, "expected a recipe that is one of plain,"),
        ({"recipe": "nvfp4", "hadamard": 12}, "PrecisionConfig.hadamard is 12; expected 0, or a power of two from 2"),
        ({"recipe": "nvfp4", "stochastic": ("dice",)}, "expected some of gradients, weights, activations"),
        ({"recipe": "nvfp4", "block": 0}, "PrecisionConfig.block is 0; expected a number above 0"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PrecisionConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "plan", "pattern", "message"),
    [
        ({}, {"linear": "fp8"}, "-", "PlanConfig.linear is 'fp8'; expected plain: PrecisionConfig.recipe is 'mxfp8'"),
        ({"first_layers": 1, "last_layers": 1}, {}, "--", "PrecisionConfig.last_layers is 1; expected fewer than 2"),
        ({"keep": ("mamba:plain",)}, {}, "-", "expected kinds that the model has: dense_up, dense_down"),
        ({"block": 20}, {"tensor": 2}, "-", "a rank has 36 of dense_up's 72 columns; expected a multiple of the 20"),
        ({"block": 4}, {"tensor": 2}, "M", "a rank has 5 of mamba_in's 10 columns; expected a multiple of the 4"),
        ({"block": 8}, {"tensor": 4}, "*", "a rank has 4 of attention_in's 8 columns; expected a multiple of the 8"),
        ({}, {"grouped_matmul": "triton_small"}, "E", "PlanConfig.grouped_matmul is 'triton_small'; expected another"),
        ({"block": 4}, {"context": 2}, "E", "PrecisionConfig.expert_tokens is None; expected a divisor of the 8 "),
        ({"block": 4, "expert_tokens": 3}, {"context": 2}, "E", "expert_tokens is 3; expected a divisor"),
        ({"block": 4, "expert_tokens": 12}, {}, "E", "expert_tokens is 12; expected a divisor of the 32 neighbouring"),
        ({"block": 4}, {"tensor": 4}, "*", "PlanConfig.tensor is 4; expected at most 2, ModelConfig.num_key_value"),
        ({"block": 1}, {"tensor": 4}, "M", "PlanConfig.tensor is 4; expected at most 2, ModelConfig.n_groups, since"),
        ({"block": 1}, {"tensor": 2}, "+", "PlanConfig.tensor is 2; expected at most 1, as all ranks compute the"),
        ({"block": 1, "mtp": True}, {"tensor": 2, "stream": "whole"}, "-/-", "at most 1, as PlanConfig.stream is 'who"),
        ({"block": 9, "mtp": True}, {"tensor": 2}, "-/-", "the 9 that the recipe rounds together in gradients of mtp"),
        ({"block": 9}, {"context": 2}, "-", "which a rank holds 8 neighbouring tokens; expected a multiple of the 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_or_its_ranks_is_refused(settings, plan, pattern, message):
    precision = PrecisionConfig(recipe="mxfp8", **settings)
    model = hybrid(pattern=pattern, mtp_depths=int("/" in pattern), **(LATENT if pattern == "+" else {}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_precision(precision, model, PlanConfig(**plan), length=32, rows=4)


@pytest.mark.parametrize(
    ("settings", "plan", "pattern"),
    [
        ({"expert_tokens": 16}, {}, "E"),
        ({}, {"tensor": 2}, "M*"),
        ({"keep": ("mamba_in.input_gradient:plain", "mamba_in.weight_gradient:plain")}, {"tensor": 4}, "M"),
        ({"keep": ("attention:plain",)}, {"tensor": 4}, "*-"),
        ({}, {"stream": "whole"}, "-/-"),
    ],
)
def test_what_every_rank_rounds_whole_is_allowed(settings, plan, pattern):
    precision = PrecisionConfig(recipe="mxfp8", block=1, mtp=True, **settings)
    model = hybrid(pattern=pattern, mtp_depths=int("/" in pattern))
    check_precision(precision, model, PlanConfig(**plan), length=32, rows=4)


def test_a_batch_of_too_many_tokens_is_refused():
    """Experts' rows carry their token's number as float32."""
    precision = PrecisionConfig(recipe="mxfp8")
    model = hybrid(pattern="E", mtp_depths=0)
    check_precision(precision, model, PlanConfig(), length=2**14, rows=2**10 - 1)
    with pytest.raises(ConfigError, match="TrainConfig.batch_size is 1024; expected fewer than 16777216 tokens in a"):
        check_precision(precision, model, PlanConfig(), length=2**14, rows=2**10)


def test_every_phase_is_checked():
    """The second one's sequences leave 6 neighbouring tokens to each of two ranks."""
    phases = (PhaseConfig(after=3, sequence_length=24),)
    model = hybrid(pattern="-", mtp_depths=0)
    run = run_config(model, plan={"context": 2}, sequence_length=32, phases=phases)
    run = dataclasses.replace(run, precision=PrecisionConfig(recipe="mxfp8", block=4))
    with pytest.raises(ConfigError, match="sequence_length is 24, of which a rank holds 6 neighbouring tokens"):
        run.check()
    dataclasses.replace(run, train=dataclasses.replace(run.train, phases=())).check()
