"""Runs whose sequences get longer: every shape is predicted, the worst decides whether the run fits."""

import dataclasses

import pytest
from tests.helpers import hybrid, run_config

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.data import DataConfig
from orogen.config.phases import PhaseConfig
from orogen.simulate.hardware import machine
from orogen.simulate.predict import fullest, predict
from orogen.simulate.routing import BALANCED
from orogen.simulate.search import _seconds, candidates, explain, search
from orogen.simulate.shapes import shapes

CLUSTER = ClusterConfig(hardware="h100", dollars_per_hour=2.0)
LONG = PhaseConfig(after=70, sequence_length=768, batch_size=8)


def run(*phases: PhaseConfig, **train):
    config = run_config(hybrid(mtp_depths=0), plan={"data": 2}, batch_size=16, sequence_length=48)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=100, phases=phases, **train))


def test_a_length_has_its_largest_batch_and_all_its_tokens():
    again = PhaseConfig(after=90, sequence_length=48, batch_size=32)
    found = [(s.config.train.batch_size, s.config.train.sequence_length, s.tokens) for s in shapes(run(LONG, again))]
    assert found == [(32, 48, 48 * (70 * 16 + 10 * 32)), (8, 768, 768 * 20 * 8)]
    assert all(not s.config.train.phases for s in shapes(run(LONG)))
    grown = shapes(run(batch_ramp=(8, 8, 24)))  # of 8 for 24 sequences: 3 steps
    assert [s.config.train.batch_size for s in grown] == [16]
    assert grown[0].tokens == 48 * (3 * 8 + 97 * 16)


def test_memory_is_that_of_the_longest_and_the_budget_of_all():
    short, whole = predict(run(), CLUSTER), predict(run(LONG), CLUSTER)
    long = predict(run(PhaseConfig(after=1, sequence_length=768, batch_size=8)), CLUSTER).shapes[1]
    assert whole.step_seconds == short.step_seconds
    assert whole.device_memory_bytes == long.device_memory_bytes > 2 * short.device_memory_bytes
    hours = (70 * short.step_seconds + 20 * long.step_seconds + 10 * long.step_seconds) / 3600
    assert whole.budget["hours"] == pytest.approx(hours)
    assert whole.budget["dollars"] == pytest.approx(2 * 2 * hours)
    assert fullest(run(LONG)).train.sequence_length == 768 and fullest(run()).train.sequence_length == 48


def test_a_search_ranks_what_fits_in_every_phase():
    held = [shape.device_memory_bytes / 2**30 for shape in predict(run(LONG), CLUSTER).shapes]
    small = dataclasses.replace(CLUSTER, memory_gib=0.6 * held[1])
    assert held[0] < small.memory_gib
    kept = search(run(), small, 2).plans
    tight = search(run(LONG), small, 2).plans
    assert any(p.plan.remat == "none" for p in kept)
    assert all(p.prediction.fits and p.prediction.shapes[1].sequence_length == 768 for p in tight)
    assert all(8 % (p.plan.data * p.plan.microbatches) == 0 for p in tight)


def test_a_search_weighs_every_phase():
    """Nearly all time is spent on the long sequences of the second phase; over the first no context is split."""
    config = run(PhaseConfig(after=10, sequence_length=32768, batch_size=8), sequence_length=1024)
    assert {plan.context for plan in candidates(config, machine(CLUSTER)[0], 8)} == {1, 2, 4, 8}
    ranking = search(config, CLUSTER, 8)
    hours = [ranked.prediction.budget["hours"] for ranked in ranking.plans]
    rates = [ranked.prediction.tokens_per_second for ranked in ranking.plans]
    assert hours == sorted(hours) and rates != sorted(rates, reverse=True)
    whole = [_seconds(dataclasses.replace(config, plan=ranked.plan), CLUSTER, machine(CLUSTER), BALANCED)
             for ranked in ranking.plans[:3]]  # fmt: skip
    assert [seconds / 3600 for seconds in whole] == pytest.approx(hours[:3], rel=0.05)
    assert explain(ranking)[-1].endswith("longer for all phases; tokens/s and MFU are of the first")


def test_a_search_names_every_batch():
    with pytest.raises(
        ConfigError, match=r"with TrainConfig.batch_size = 16 \(sizes in its ramp and phases: 8, 16\); expec"
    ):
        search(run(LONG), CLUSTER, 13)


def test_a_search_needs_no_sources_for_the_weights_of_phases():
    data = DataConfig(corpus="text", tokenizer="byte")
    blended = dataclasses.replace(run(dataclasses.replace(LONG, weights={"code": 1.0})), data=data)
    assert search(blended, CLUSTER, 2).fitting > 0
