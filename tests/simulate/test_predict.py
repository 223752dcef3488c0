"""A step's prediction: sums that must hold, what must make it slower, and our own measurements."""

import dataclasses
import json
import pathlib

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig
from orogen.cost.flops import training_flops_per_token
from orogen.simulate.budget import best_interval, goodput
from orogen.simulate.hardware import machine
from orogen.simulate.predict import Step, predict
from orogen.simulate.routing import Routing, read_routing
from orogen.simulate.shown import prediction_lines

MEASURED = pathlib.Path(__file__).parents[2] / "experiments" / "two_gpus" / "results.jsonl"
NANO = load(["gin_configs/models/nemotron3_nano_30b_a3b.gin"])[0].model
SMALL = TrainConfig(steps=1, batch_size=1, sequence_length=8192, seed=0, compute_dtype="bfloat16")


def nano(**plan) -> RunConfig:
    sizes = {"data": 16, "expert": 8, "dispatch": "ragged", "attention": "blocked", "ssd": "triton", "remat": "full"}
    train = TrainConfig(steps=10, batch_size=64, sequence_length=8192, seed=0, compute_dtype="bfloat16")
    return RunConfig(model=NANO, plan=PlanConfig(**{**sizes, **plan}), train=train)


def test_the_parts_of_the_step_add_up_and_the_numbers_agree():
    found = predict(nano(stage=2, data=8, microbatches=8))
    assert sum(found.seconds.values()) == pytest.approx(found.step_seconds)
    assert found.tokens_per_second == pytest.approx(64 * 8192 / found.step_seconds)
    flops = 64 * 8192 * training_flops_per_token(NANO, 8192)
    assert found.mfu == pytest.approx(flops / found.step_seconds / 16 / 989.4e12)
    assert found.device_memory_bytes == max(stage.total for stage in found.memory)
    assert json.loads(json.dumps(found.facts()))["step_seconds"] == found.step_seconds
    busy = sum(work.end - work.start for work in found.timeline)
    last = max(work.end for work in found.timeline)
    assert found.bubble == pytest.approx(1 - busy / 2 / last, abs=1e-6)


@pytest.mark.parametrize(
    ("cluster", "routing"),
    [
        ({"straggler": 0.3}, Routing()),
        ({"constants": ("matmul=0.5",)}, Routing()),
        ({"node_size": 4}, Routing()),
        ({}, Routing("zipf", 1.0)),
    ],
)
def test_what_slows_a_step_is_seen(cluster, routing):
    assert predict(nano(), ClusterConfig(**cluster), routing=routing).step_seconds > predict(nano()).step_seconds


def test_what_overlapping_microbatches_hide_is_said_to_be_left_out():
    one, two = (predict(nano(microbatches=2, interleave=n)) for n in (1, 2))
    assert one.left_out == "" and one.step_seconds == two.step_seconds
    assert two.left_out in prediction_lines(two) and "2 overlapping microbatches" in two.left_out
    assert two.memory[0].parts["activations"] == 2 * one.memory[0].parts["activations"]


def test_stragglers_slow_compute_alone():
    before, after = (predict(nano(), ClusterConfig(straggler=s)).seconds for s in (0.0, 0.5))
    assert before["straggler"] == 0
    assert after["straggler"] == pytest.approx(0.5 * before["compute"], rel=0.2)  # compute has what sending slows


def test_uneven_routing_takes_memory_where_buffers_are_dynamic():
    def of(software: str, routing: Routing) -> float:
        return predict(nano(remat="none"), ClusterConfig(software=software), routing=routing).device_memory_bytes

    zipf = Routing("zipf", 1.0)
    assert of("megatron", zipf) > 1.1 * of("megatron", Routing())
    assert of("orogen", zipf) == of("orogen", Routing())


def test_routers_compute_in_bfloat16_whatever_the_other_products_do():
    """FP8 leaves the time of their products, and of the head's, as it is; those of the mixers take less."""
    plain, eight = (
        {line.operation: line.compute_seconds for line in predict(nano(linear=linear)).rooflines}
        for linear in ("plain", "fp8")
    )
    assert eight["router"] == plain["router"] and eight["head"] == plain["head"]
    assert eight["in_proj"] == pytest.approx(plain["in_proj"] * (0.80 * 989.4) / (0.67 * 1978.9))


@pytest.mark.parametrize("hidden", [0.0, 0.25, 1.0])
def test_a_send_delays_the_next_stage_once(hidden):
    """One microbatch through two stages: both stages' passes one after another, and two sends."""
    cluster = ClusterConfig(software="megatron", constants=(f"overlap_stage={hidden}",))
    config = dataclasses.replace(nano(data=1, expert=1, stage=2, microbatches=1), train=SMALL)
    step = Step(config, cluster, machine(cluster), Routing(), 10**6)
    hop = step.passes.hop()
    assert hop is not None and hop.seconds > 0
    passes = sum(time.seconds for times in step.times.values() for time in times)
    found = step.prediction()
    assert max(work.end for work in found.timeline) == pytest.approx(passes + 2 * hop.seconds, rel=1e-12)
    sent = [traffic for traffic in found.communication if traffic.axes == ("stage",)]
    # A stage sends one stream on average: stage 0 its output, stage 1 its input's gradient.
    assert hop.record.bytes == 8192 * NANO.hidden_size * 2
    assert any(traffic.bytes == hop.record.bytes for traffic in sent)
    assert sum(found.seconds.values()) == pytest.approx(found.step_seconds)


def test_the_imbalance_of_loads_is_that_of_the_busiest_rank():
    """Four experts on two ranks: 1 + 3 and 4 + 0, and all alike: mean of 4/4 and of even."""
    plan = PlanConfig(data=2, expert=2)
    measured = Routing("measured", loads_le=((1, 3, 4, 0), (6, 0, 1, 1)))
    assert measured.imbalance(4, plan) == pytest.approx((1 + 6 / 4) / 2)
    assert Routing("zipf", 0.0).imbalance(4, plan) == 1
    assert Routing("zipf", 2.0).imbalance(4, plan) == pytest.approx(
        (1 + 1 / 4) / (1 + 1 / 4 + 1 / 9 + 1 / 16) * 2, rel=0.15
    )
    with pytest.raises(ConfigError, match="are of 4 experts; expected ModelConfig.n_routed_experts = 8"):
        measured.imbalance(8, plan)


def test_loads_are_read_from_a_runs_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "expert_load": [[1, 3]]}\n{"step": 2, "loss": 1}\n')
    assert read_routing(str(tmp_path)).loads_le == ((1, 3),)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1}\n')
    for text, expected in (
        (str(tmp_path), "has no 'expert_load'"),
        ("zipf:-1", "zipf:EXPONENT"),
        ("x", "a run folder"),
    ):
        with pytest.raises(ConfigError, match=expected):
            read_routing(text)


def test_goodput_by_hand():
    """10 devices that fail every 100 hours each: one failure in 10 hours. Checkpoints of 60 s every 40 minutes."""
    cluster = ClusterConfig(mtbf_hours=100.0, checkpoint_minutes=40.0, checkpoint_seconds=60.0, restart_minutes=9.0)
    lost = 41 / 2 + 9
    assert goodput(cluster, 10) == pytest.approx(40 / 41 * 600 / (600 + lost))
    assert goodput(ClusterConfig(), 10**6) == 1
    best = dataclasses.replace(cluster, checkpoint_minutes=None)
    assert goodput(best, 10) >= max(
        goodput(dataclasses.replace(cluster, checkpoint_minutes=m), 10) for m in (5.0, 20.0, 40.0, 80.0)
    )
    assert best_interval(60, 36000) == pytest.approx((2 * 60 * 36000) ** 0.5)


def test_budget_by_hand():
    found = predict(nano(), ClusterConfig(dollars_per_hour=2.0, watts=1000.0))
    hours = 10 * found.step_seconds / 3600
    assert found.budget == pytest.approx(
        {"hours": hours, "device_hours": 16 * hours, "kwh": 16 * hours, "dollars": 32 * hours}
    )


def test_refusals_name_what_is_wrong():
    with pytest.raises(ConfigError, match="hardware is 'h900'; expected one of a100"):
        predict(nano(), ClusterConfig(hardware="h900"))
    with pytest.raises(ConfigError, match="constants has 'speed'; expected names among"):
        predict(nano(), ClusterConfig(constants=("speed=2",)))
    with pytest.raises(ConfigError, match="devices is 8; expected the 16 devices of the plan"):
        predict(nano(), ClusterConfig(devices=8))
    with pytest.raises(ConfigError, match="expected a multiple of PlanConfig.expert = 48"):
        predict(nano(data=48, expert=48, microbatches=1))


def measured() -> dict[str, dict]:
    return {d["case"]: d for d in map(json.loads, MEASURED.read_text().splitlines()) if "plan" in d}


def of_measurement(record: dict) -> RunConfig:
    model = dataclasses.replace(load(["gin_configs/models/r1.gin"])[0].model, pattern=record["pattern"])
    frozen = {name: tuple(v) if isinstance(v, list) else v for name, v in record["plan"].items()}
    rows = record["rows"] * record["microbatches"]
    train = TrainConfig(
        steps=1, batch_size=rows, sequence_length=record["sequence_length"], seed=0, compute_dtype="bfloat16"
    )
    optimizer = OptimizerConfig(learning_rate=1e-3, moment_dtype="bfloat16")
    return RunConfig(model=model, plan=PlanConfig(**frozen), train=train, optimizer=optimizer)


def test_our_measurements_are_met():
    """13 plans on one and two H200s: the median within 5 %, the worst within 12 %."""
    errors = {
        case: predict(of_measurement(record), ClusterConfig(hardware="h200")).step_seconds * 1e3 / record["ms"] - 1
        for case, record in measured().items()
    }
    ranked = sorted(map(abs, errors.values()))
    assert len(ranked) == 13
    assert ranked[6] < 0.05 and ranked[-1] < 0.12, errors


def test_small_runs_are_predicted_too():
    found = predict(run_config(hybrid(), plan={"data": 2}), ClusterConfig(hardware="cpu"))
    assert found.step_seconds > 0 and found.fits
