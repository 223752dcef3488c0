"""Parts of a run that do not fit each other are refused by a ConfigError that names the field."""

import dataclasses

import pytest
from tests.helpers import HYBRID, hybrid

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig, TrainConfig

TRAIN = {"steps": 5, "batch_size": 12, "sequence_length": 20, "seed": 0}


def run(plan: dict, **train) -> RunConfig:
    return RunConfig(
        model=None,
        plan=PlanConfig(**plan),
        data=None,
        train=TrainConfig(**{**TRAIN, **train}),
        optimizer=None,
    )


def test_batch_must_fill_ranks_and_microbatches():
    run({"data": 3, "microbatches": 2}, batch_size=12).check()
    with pytest.raises(ConfigError) as caught:
        run({"data": 3, "microbatches": 2}, batch_size=9).check()
    assert str(caught.value) == "TrainConfig.batch_size is 9; expected a multiple of data x microbatches = 3 x 2"


def test_sequence_must_divide_over_tensor():
    run({"tensor": 5}, sequence_length=20).check()
    with pytest.raises(ConfigError) as caught:
        run({"tensor": 5}, sequence_length=21).check()
    assert str(caught.value) == "TrainConfig.sequence_length is 21; expected a multiple of context x tensor = 1 x 5"


@pytest.mark.parametrize(("pattern", "expected"), [("M*-", None), ("M/E", "1 x 5"), ("ME", "1 x 5")])
def test_a_whole_stream_must_divide_over_tensor_only_with_experts(pattern, expected):
    """Each rank routes its own share of the tokens."""
    config = run({"tensor": 5, "stream": "whole"}, sequence_length=21)
    config = dataclasses.replace(config, model=hybrid(pattern=pattern, mtp_depths=int("/" in pattern)))
    if expected is None:
        config.check()
        return
    with pytest.raises(ConfigError) as caught:
        config.check()
    message = f"TrainConfig.sequence_length is 21; expected a multiple of context x tensor = {expected}"
    assert str(caught.value) == message


def test_overlapping_microbatches_leave_no_rest():
    run({"microbatches": 6, "interleave": 3}).check()
    with pytest.raises(ConfigError) as caught:
        run({"microbatches": 6, "interleave": 4}).check()
    assert str(caught.value) == "PlanConfig.interleave is 4; expected a divisor of microbatches = 6"


@pytest.mark.parametrize(("tensor", "pieces"), [(1, 2), (2, 2), (5, 10)])
def test_sequence_must_divide_into_two_parts_per_context_rank(tensor, pieces):
    plan = {"context": 3, "tensor": tensor}
    run(plan, sequence_length=3 * pieces).check()
    with pytest.raises(ConfigError) as caught:
        run(plan, sequence_length=3 * pieces + 1).check()
    assert str(caught.value) == (
        f"TrainConfig.sequence_length is {3 * pieces + 1}; "
        f"expected a multiple of context x lcm(2, tensor) = 3 x {pieces}"
    )


@pytest.mark.parametrize(("changes", "reach"), [({}, 3), ({"mtp_depths": 4}, 5), ({"conv_kernel": 8}, 7)])
def test_parts_must_be_as_long_as_the_reach_of_tokens(changes, reach):
    def reaching(length: int) -> RunConfig:
        config = run({"context": 2}, sequence_length=length)
        return dataclasses.replace(config, model=ModelConfig(**{**HYBRID, **changes}))

    reaching(4 * reach).check()
    with pytest.raises(ConfigError) as caught:
        reaching(4 * reach - 4).check()
    assert str(caught.value) == (
        f"TrainConfig.sequence_length is {4 * reach - 4}; expected at least 2 x context x {reach} = {4 * reach}: "
        f"tokens read {reach} from another rank"
    )


@pytest.mark.parametrize("field", ["sequence_length", "sample_tokens"])
def test_sequences_longer_than_the_learned_positions_are_refused(field):
    def learned(positions: int) -> RunConfig:
        config = run({}, **{"sequence_length": 20, "sample_tokens": 20, field: 24})
        return dataclasses.replace(config, model=ModelConfig(**{**HYBRID, "learned_positions": positions}))

    learned(24).check()
    with pytest.raises(ConfigError) as caught:
        learned(23).check()
    assert str(caught.value) == f"TrainConfig.{field} is 24; expected at most ModelConfig.learned_positions = 23"


@pytest.mark.parametrize(("field", "kernel"), [("attention", "cudnn"), ("grouped_matmul", "mosaic")])
def test_kernels_of_half_precision_refuse_float32(field, kernel):
    run({field: kernel}, compute_dtype="bfloat16").check()
    with pytest.raises(ConfigError) as caught:
        run({field: kernel}, compute_dtype="float32").check()
    expected = "another kernel for computation in float32"
    assert str(caught.value) == f"PlanConfig.{field} is {kernel!r}; expected {expected}"


@pytest.mark.parametrize("changes", [{"pattern": "Mw/*", "sliding_window": 4}, {"attention_sinks": True}])
def test_attention_by_cudnn_has_no_windows_and_no_sinks(changes):
    def model(**changes) -> RunConfig:
        config = run({"attention": "cudnn"}, compute_dtype="bfloat16")
        return dataclasses.replace(config, model=ModelConfig(**{**HYBRID, **changes}))

    model().check()
    with pytest.raises(ConfigError) as caught:
        model(**changes).check()
    expected = "full or blocked: the model has windows, sinks or latent attention"
    assert str(caught.value) == f"PlanConfig.attention is 'cudnn'; expected {expected}"


def test_devices_are_counted():
    assert PlanConfig(data=3, tensor=5, expert=15).devices == 15
