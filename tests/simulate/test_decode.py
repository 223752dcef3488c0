"""Inference: caches by hand and beside the engine's own, and our measurements of decoding."""

import dataclasses
import json

import pytest
from tests.helpers import hybrid

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.simulate.decode import cache_of, largest_context, predict_inference


def model(name: str):
    return load([f"gin_configs/models/{name}.gin"])[0].model


def engine(**fields) -> EngineConfig:
    return EngineConfig(**{"compute_dtype": "bfloat16", "prefix_cache": False, "slots": 1, **fields})


def test_a_requests_cache_by_hand():
    """Nano 2 9B: 4 attention layers of 8 heads of 128, 27 Mamba layers of 128 heads of 80, 8 groups, state 128."""
    config = model("nemotron_nano_9b_v2")
    found = cache_of(config, PlanConfig(), engine())
    assert found.per_token == 4 * (2 * 8 * 128 * 2 + 4)
    assert found.states == 27 * (128 * 80 * 128 * 4 + 3 * (128 * 80 + 2 * 8 * 128) * 2)
    assert found.ring == 0
    replayed = cache_of(config, PlanConfig(), engine(replay=16))
    assert replayed.ring == 27 * 16 * ((128 * 80 + 8 * 128) * 2 + 128 * 4)
    fewer = cache_of(config, PlanConfig(), engine(key_values="fp8", state_dtype="int8"))
    assert fewer.per_token == 4 * (2 * 8 * 128 + 4)
    assert fewer.states == 27 * (128 * 80 * (128 + 4) + 3 * (128 * 80 + 2 * 8 * 128) * 2)
    halves = cache_of(config, PlanConfig(tensor=2), engine())
    assert halves.per_token == 4 * (2 * 4 * 128 * 2 + 4)
    assert halves.states == found.states / 2


def test_weights_in_8_bits_are_the_matrices_of_layers():
    """Qwen3-8B: 36 layers of four attention and three MLP matrices; embedding, head and norms stay in bfloat16."""
    config = model("qwen3_8b")
    attention = 4096 * (2 * 32 + 2 * 8) * 128
    matrices = 36 * (attention + 3 * 4096 * 12288)
    wide, eight = (
        predict_inference(config, engine=engine(weights=weights), prompt=64).memory["weights"]
        for weights in ("decoded", "fp8")
    )
    assert wide - eight == matrices


def test_windows_keep_a_ring_that_is_read_up_to_the_text():
    """gpt-oss-20b: 12 layers with a window of 128 tokens and 12 without, 8 key heads of 64 each."""
    config, each = model("gpt_oss_20b"), 12 * (2 * 8 * 64 * 2 + 4)
    cache = cache_of(config, PlanConfig(), engine())
    assert (cache.per_token, cache.windowed, cache.states) == (each, each, 0)
    of = lambda prompt: predict_inference(  # noqa: E731
        config, engine=engine(slots=3, prefill_tokens=512), prompt=prompt, new=2
    )
    assert of(1000).memory["key_values"] == 3 * each * (1002 + 128 + 512)
    assert of(1000).memory["states"] == 0
    read = 3.35e12 * 0.8
    inside, beyond = of(100).step_seconds - of(40).step_seconds, of(1000).step_seconds - of(400).step_seconds
    assert inside == pytest.approx(3 * 2 * each * 60 / read) and beyond == pytest.approx(3 * each * 600 / read)


def test_a_prompt_pays_for_the_logits_of_its_last_position_alone():
    """Twice the vocabulary adds one read of 32,768 columns of 2,048 weights, an input row and the logits."""
    config = model("r1")
    narrow, wide = (
        predict_inference(dataclasses.replace(config, vocab_size=size), engine=engine(), prompt=8192)
        for size in (32768, 65536)
    )
    added = wide.first_token_seconds - narrow.first_token_seconds
    assert added == pytest.approx(2 * 32768 * 2049 / (3.35e12 * 0.8), rel=1e-6)


def test_states_that_no_kernel_reads_go_through_float32():
    """Nano 2 9B: 27 layers with states of 128 heads of 80 x 128."""
    numbers, read, config = 27 * 128 * 80 * 128, 3.35e12 * 0.8, model("nemotron_nano_9b_v2")
    of = lambda **kept: predict_inference(config, engine=engine(**kept), prompt=64).step_seconds  # noqa: E731
    whole, half = of(), of(state_dtype="float16")
    assert whole - half == pytest.approx(2 * 2 * numbers / read)
    assert of(state_dtype="float16", state_rounding="nearest") - half == pytest.approx(2 * 4 * numbers / read)
    assert whole - of(state_dtype="int8") == pytest.approx(2 * (4 - 1 - 4 / 128) * numbers / read)
    nearest = of(state_dtype="int8", state_rounding="nearest")
    assert nearest - whole == pytest.approx(2 * (1 + 4 / 128) * numbers / read)
    replayed = of(state_dtype="int8", replay=16) - of(replay=16)
    assert replayed == pytest.approx((1 + 4 / 128) * numbers / read * (1 + 1 / 16))


@pytest.mark.parametrize("plan", [PlanConfig(), PlanConfig(tensor=2)])
def test_without_a_drafter_depths_of_mtp_take_no_time(plan):
    found = [
        predict_inference(hybrid(mtp_depths=depths), plan=plan, engine=engine(slots=4), prompt=64) for depths in (1, 3)
    ]
    assert found[0].first_token_seconds == found[1].first_token_seconds
    assert found[0].step_seconds == found[1].step_seconds


def test_nano_2_reads_128k_tokens_on_a_card_of_22_gib():
    """arXiv:2508.14444: the 9B model was pruned for 128k tokens on an A10G, the 12B model does not fit in bfloat16."""
    card = ClusterConfig(memory_gib=22.0)
    assert largest_context(model("nemotron_nano_9b_v2"), card, engine=engine()) >= 128 * 1024
    assert largest_context(model("nemotron_nano_12b_v2"), card, engine=engine()) == 0


@pytest.mark.parametrize(
    ("hardware", "slots", "weights", "measured"),
    [
        ("h100", 1, "decoded", 817), ("h100", 64, "decoded", 13_568), ("h200", 1, "decoded", 917),
        ("h200", 4, "decoded", 2_728), ("h200", 64, "decoded", 18_635), ("h200", 1, "fp8", 815),
        ("h200", 64, "fp8", 17_352),
    ],
)  # fmt: skip
def test_our_decoding_is_met(hardware, slots, weights, measured):
    """experiments/decode_throughput: R1 after a prompt of 1,024 tokens. Weights in 8 bits are slower."""
    served = engine(slots=slots, weights=weights)
    found = predict_inference(model("r1"), ClusterConfig(hardware=hardware), engine=served, prompt=1024, new=128)
    assert found.tokens_per_second == pytest.approx(measured, rel=0.1)


def test_more_requests_and_longer_texts_take_longer():
    config = model("nemotron3_nano_30b_a3b")
    of = lambda slots, prompt: predict_inference(  # noqa: E731
        config, ClusterConfig(hardware="h200"), engine=engine(slots=slots), prompt=prompt, new=64
    )
    few, many, long = of(1, 1024), of(64, 1024), of(64, 65536)
    assert few.step_seconds < many.step_seconds < long.step_seconds
    assert few.tokens_per_second < many.tokens_per_second
    assert few.first_token_seconds < long.first_token_seconds
    assert many.memory["key_values"] == 64 * (1024 + 64) * 6 * (2 * 2 * 128 * 2 + 4)
    assert sum(many.memory.values()) == many.device_memory_bytes


def test_a_context_of_its_longest_size_fits_exactly():
    config = hybrid(mtp_depths=0, pattern="M*-E")
    card = ClusterConfig(memory_gib=0.01)
    longest = largest_context(config, card, engine=engine())
    sizes = [predict_inference(config, card, engine=engine(), prompt=longest - 1, new=n) for n in (1, 2)]
    assert [size.device_memory_bytes <= size.memory_limit_bytes for size in sizes] == [True, False]


def test_refusals_and_the_command(capsys):
    for axis, why in (("stage", "an engine has no pipeline"), ("context", "the simulator does not predict engines")):
        with pytest.raises(ConfigError, match=f"PlanConfig.{axis} is 2; expected 1: {why}"):
            predict_inference(hybrid(), plan=PlanConfig(**{axis: 2}))
    file = "gin_configs/models/nemotron_nano_9b_v2.gin"
    bindings = ["--gin_bindings", "EngineConfig.compute_dtype='bfloat16'", "--gin_bindings", "EngineConfig.slots=4"]
    assert main(["simulate", "--gin_file", file, "--inference", *bindings, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["slots"] == 4 and facts["first_token_seconds"] > 0
    small = ["--gin_bindings", "ClusterConfig.memory_gib=10.0"]
    assert main(["simulate", "--gin_file", file, "--inference", *bindings, *small]) == 2
    assert "longest context that fits: 0 tokens" in capsys.readouterr().err
