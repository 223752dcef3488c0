"""Which runs a scaling curve asks for."""

import dataclasses

import pytest

from orogen.config.cluster import ClusterConfig
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig, TrainConfig
from orogen.simulate import scaling


@pytest.fixture
def asked(monkeypatch):
    """The runs for which a prediction was requested."""
    runs = []

    class Found:
        def __init__(self, config: RunConfig):
            self.devices, self.tokens_per_second = config.plan.devices, 7.0 * config.plan.devices

    def predict(config, cluster, *, routing):
        assert cluster.devices is None and cluster.hardware == "a100"
        runs.append(config)
        return Found(config)

    monkeypatch.setattr(scaling, "predict", predict)
    return runs


def run(**plan: object) -> RunConfig:
    model = load(["gin_configs/models/nemotron3_toy.gin"])[0].model
    train = TrainConfig(steps=1, batch_size=48, sequence_length=66, seed=0)
    return RunConfig(model=model, plan=PlanConfig(**plan), train=train).check()


CLUSTER = ClusterConfig(hardware="a100", devices=4)


def test_weak_grows_the_batch_and_strong_divides_the_microbatches(asked, monkeypatch):
    monkeypatch.setattr(scaling, "DOUBLINGS", 3)
    points = scaling.scale(run(data=2, tensor=2, microbatches=4), CLUSTER)
    shapes = [(r.plan.data, r.plan.microbatches, r.train.batch_size) for r in asked]
    assert shapes == [(2, 4, 48), (4, 4, 96), (8, 4, 192), (16, 4, 384), (2, 4, 48), (4, 2, 48), (8, 1, 48)]
    assert [(p.kind, p.devices) for p in points] == [
        *(("weak", n) for n in (4, 8, 16, 32)), *(("strong", n) for n in (4, 8, 16)),
    ]  # fmt: skip
    assert points[1].tokens_per_second == 56


def test_an_odd_number_of_microbatches_is_not_halved(asked):
    kinds = [point.kind for point in scaling.scale(run(data=2, tensor=1, microbatches=3), CLUSTER)]
    assert kinds.count("strong") == 1


@pytest.mark.parametrize("most, counts", [(8, [2, 4, 8]), (7, [2, 4]), (1, [2])])
def test_devices_end_at_the_most(asked, monkeypatch, most, counts):
    monkeypatch.setattr(scaling, "MOST_DEVICES", most)
    weak = [point.devices for point in scaling.scale(run(data=2), CLUSTER) if point.kind == "weak"]
    assert weak == counts


def test_the_rest_of_the_run_stays(asked):
    given = run(data=2, microbatches=2, expert=2)
    scaling.scale(given, CLUSTER)
    for other in asked:
        same = dataclasses.replace(
            other,
            plan=dataclasses.replace(other.plan, data=2, microbatches=2),
            train=dataclasses.replace(other.train, batch_size=48),
        )
        assert same == given


def test_ranks_that_cannot_share_the_parameters_end_the_curve(asked):
    """Its experts are 64 wide."""
    weak = [p.devices for p in scaling.scale(run(data=8, fsdp="optimizer"), CLUSTER) if p.kind == "weak"]
    assert weak == [8, 16, 32, 64]


def test_an_interleaved_pipeline_keeps_a_microbatch_per_stage(asked):
    plan = {"stage": 2, "schedule": "interleaved", "microbatches": 12, "virtual": 2}
    strong = [p.devices for p in scaling.scale(run(**plan), CLUSTER) if p.kind == "strong"]
    assert strong == [2, 4]  # then 3 microbatches
