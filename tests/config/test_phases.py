"""Stretches of equal shapes and blend, against tables worked out by hand."""

import dataclasses

import pytest

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig, SourceConfig
from orogen.config.load import load, load_saved
from orogen.config.phases import PhaseConfig, stretches
from orogen.config.plan import PlanConfig
from orogen.config.run import OptimizerConfig, RunConfig, TrainConfig

RUN = {"steps": 100, "batch_size": 12, "sequence_length": 20, "ramp": None, "phases": (), "weights": {}}
TRAIN = {"steps": 100, "batch_size": 12, "sequence_length": 20, "seed": 0}
TWO = {"a": 3.0, "b": 1.0}


def table(**changes):
    return [tuple(one)[:4] for one in stretches(**{**RUN, **changes})]


def test_a_constant_run_is_one_stretch():
    (one,) = stretches(**RUN)
    assert tuple(one) == (0, 0, 12, 20, {})


def test_phases_change_what_they_name_and_keep_the_rest():
    phases = (
        PhaseConfig(after=10, weights={"b": 5.0}),
        PhaseConfig(after=30, sequence_length=40),
        PhaseConfig(after=99, batch_size=7, weights={"a": 1.0, "b": 4.0}),
    )
    found = stretches(**{**RUN, "phases": phases, "weights": TWO})
    assert [tuple(one) for one in found] == [
        (0, 0, 12, 20, {"a": 0.75, "b": 0.25}),
        (10, 1, 12, 20, {"a": 0.0, "b": 1.0}),
        (30, 2, 12, 40, {"a": 0.0, "b": 1.0}),
        (99, 3, 7, 40, {"a": 0.2, "b": 0.8}),
    ]


def test_a_ramp_gives_each_size_an_equal_share_of_the_sequences():
    """From 4 by 4 to 12 within 20 sequences: 4 until 10 are seen, which takes three steps; 8 until 20, one step more
    than the 12 seen; then 12."""
    assert table(ramp=(4, 4, 20)) == [(0, 0, 4, 20), (3, 0, 8, 20), (4, 0, 12, 20)]


def test_a_ramp_shorter_than_its_steps_leaves_sizes_out():
    """Of 2, 4 … 12 within 5 sequences, one for each: 2 sequences pass the ends of sizes 2 and 4, then 6 the rest."""
    assert table(ramp=(2, 2, 5)) == [(0, 0, 2, 20), (1, 0, 6, 20), (2, 0, 12, 20)]


def test_a_ramp_crosses_a_phase():
    phases = (PhaseConfig(after=1, sequence_length=40), PhaseConfig(after=4, batch_size=6))
    assert table(ramp=(4, 4, 20), phases=phases) == [(0, 0, 4, 20), (1, 1, 4, 40), (3, 1, 8, 40), (4, 2, 6, 40)]


def test_mt_nlg_s_ramp():
    """32 to 1,920 by 32 over 12 B tokens of sequences of 2,048: 59 increments, 99,309 sequences each."""
    found = stretches(**{**RUN, "steps": 10**6, "batch_size": 1920, "ramp": (32, 32, 12 * 10**9 // 2048)})
    assert [one.batch_size for one in found] == list(range(32, 1921, 32))
    ends = [one.after for one in found[1:]]
    seen = sum(one.batch_size * (end - one.after) for one, end in zip(found, ends, strict=False))
    assert 0 <= seen - 12 * 10**9 // 2048 < 1920
    assert found[1].after == 3104  # 99,309 / 32 = 3,103.4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": (PhaseConfig(after=100),)}, "PhaseConfig.after is 100; expected a number above 0, where"),
        ({"phases": (PhaseConfig(after=9), PhaseConfig(after=9))}, "PhaseConfig.after is 9; expected a number above 9"),
        ({"phases": (PhaseConfig(after=1, weights={"c": 1.0}),)}, "has 'c'; expected some of ['a', 'b']"),
        ({"phases": (PhaseConfig(after=3, batch_size=6),), "ramp": (4, 4, 20)}, "expected at least 4, when"),
    ],
)
def test_impossible_phases_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        stretches(**{**RUN, "weights": TWO, **changes})
    assert message in str(caught.value)


@pytest.mark.parametrize("ramp", [(0, 4, 20), (4, 3, 20), (12, 4, 20), (4, 4, 0), (4, -4, 20)])
def test_an_impossible_ramp_is_refused(ramp):
    with pytest.raises(ConfigError, match=r"batch_ramp is .* expected numbers above 0, the second a divisor"):
        TrainConfig(**TRAIN, batch_ramp=ramp)


def test_every_shape_must_fit_the_plan():
    plan = PlanConfig(data=3, dispatch="allgather")
    RunConfig(plan=plan, train=TrainConfig(**TRAIN)).check()
    for change in ({"batch_ramp": (4, 4, 20)}, {"phases": (PhaseConfig(after=5, batch_size=4),)}):
        with pytest.raises(ConfigError, match=r"TrainConfig.batch_size is 4; expected a multiple of data x micro"):
            RunConfig(plan=plan, train=TrainConfig(**TRAIN, **change)).check()


def test_the_largest_batch_is_that_of_any_phase():
    run = RunConfig(plan=PlanConfig(), train=TrainConfig(**TRAIN, phases=(PhaseConfig(after=5, sequence_length=90),)))
    assert (run.largest().train.batch_size, run.largest().train.sequence_length) == (12, 90)


SOURCES = (SourceConfig(name="a", corpus="x", weight=1.0), SourceConfig(name="b", corpus="y", weight=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "DataConfig.corpus is None; expected a path, or None beside DataConfig.sources"),
        ({"corpus": "x", "sources": SOURCES}, "DataConfig.corpus is 'x'; expected a path, or None"),
        ({"sources": (*SOURCES, SOURCES[0])}, "has the names ['a', 'b', 'a']; expected each once"),
        ({"sources": SOURCES[1:]}, "has weights of 0 only; expected one above 0"),
        ({"sources": ("x",)}, "expected a value of type tuple["),
    ],
)
def test_a_blend_is_checked(changes, message):
    with pytest.raises(ConfigError) as caught:
        DataConfig(tokenizer="byte", **changes)
    assert message in str(caught.value)


def test_gin_files_name_sources_and_phases_by_scope(tmp_path):
    (tmp_path / "a.gin").write_text("""
DataConfig.sources = (@web/SourceConfig(), @code/SourceConfig())
DataConfig.tokenizer = 'byte'
web/SourceConfig.name = 'web'
web/SourceConfig.corpus = 'stores/web'
web/SourceConfig.weight = 2.0
code/SourceConfig.name = 'code'
code/SourceConfig.corpus = 'stores/code'
code/SourceConfig.weight = 1.0
code/SourceConfig.max_epochs = 4.0
TrainConfig.steps = 50
TrainConfig.batch_size = 8
TrainConfig.sequence_length = 64
TrainConfig.seed = 0
TrainConfig.phases = [@late/PhaseConfig()]
late/PhaseConfig.after = 40
late/PhaseConfig.weights = {'code': 1.0}
""")
    config, text = load([tmp_path / "a.gin"])
    assert [(one.name, one.max_epochs) for one in config.data.sources] == [("web", None), ("code", 4.0)]
    assert [one.weights for one in config.stretches()] == [{"web": 2 / 3, "code": 1 / 3}, {"web": 0.0, "code": 1.0}]
    (tmp_path / "saved.gin").write_text(text)
    assert load_saved(tmp_path / "saved.gin") == config
    with pytest.raises(ConfigError, match="bindings that nothing read: wbe/SourceConfig.weight"):
        load([tmp_path / "a.gin"], ["wbe/SourceConfig.weight = 1.0"])


def test_a_name_that_metrics_could_not_show_is_refused():
    for name in ("", "a/b", "a b", "é"):
        with pytest.raises(ConfigError, match="expected letters, digits, _ and -"):
            dataclasses.replace(SOURCES[0], name=name)


def test_warm_up_ends_before_a_phase_with_a_rate_of_its_own():
    train = TrainConfig(**TRAIN, phases=(PhaseConfig(after=10, learning_rate=1e-4),))
    run = lambda warmup: RunConfig(  # noqa: E731
        plan=PlanConfig(), train=train, optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=warmup)
    )
    run(10).check()
    with pytest.raises(ConfigError, match="warmup_steps is 11; expected at most PhaseConfig.after of the first"):
        run(11).check()
