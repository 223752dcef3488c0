"""Distillation on policy: advantages of tokens from teachers of domains, against likelihoods by hand; and a run.

The policy and the teachers are MLPs that add nothing, between embeddings that the norm does not change and a head. With
a head of 0 and a · ln 2 / 2, the likelihoods after tokens 0, 1, 2 are proportional to (2^a, 1, 1), (1, 2^a, 1) and
(1, 2^-a, 1).
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import MODEL, bound, run_config

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.cost.assemble import assemble
from orogen.data.vocabulary import byte_tokenizer
from orogen.posttrain import teachers
from orogen.posttrain.advantages import taught
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.measures import measured
from orogen.posttrain.objective import ADVANTAGE, IMPORTANCE, WEIGHT
from orogen.posttrain.samples import Mismatch, Sample, Track, batch_of
from orogen.posttrain.teachers import Teachers
from orogen.report.metrics import read_metrics

SMALL = ModelConfig(pattern="-", vocab_size=3, hidden_size=2, intermediate_size=3, layer_norm_epsilon=1e-12)
WIDER = dataclasses.replace(SMALL, intermediate_size=5, pattern="--")  # another architecture
HIDDEN = np.array([[1, 1], [1, -1], [-1, 1]], np.float64)
POLICY = 1.0
TEACHERS = {"sums": 2.0, "words": -1.0}


def log_likelihood(a, before, token):
    weights = {0: (2**a, 1, 1), 1: (1, 2**a, 1), 2: (1, 2**-a, 1)}[before]
    return math.log(weights[token] / sum(weights))


def weights_of(model, built, a):
    half = a * np.log(2) / 2
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), built.params)
    params["embedding"]["weight"][...] = jnp.array(HIDDEN, jnp.float32)
    params["head"]["weight"][...] = jnp.array([[half, half, 0], [half, -half, 0]], jnp.float32)
    params["norm"]["weight"][...] = jnp.ones(2)
    return params, built.buffers


class Folder:
    """A checkpoint whose name is its head's a."""

    def __init__(self, path, words=byte_tokenizer):
        self.a, self.config, self.tokenizer = float(path.name), WIDER, words

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, built, plan, dtype):
        return weights_of(self.config, built, self.a)


def environment(name, **fields):
    return EnvironmentConfig(name=name, kind="synthetic", family="copy", **fields)


def sample(name, ids, chosen, **fields):
    rollout = [log_likelihood(POLICY, *pair) if c else 0.0 for pair, c in zip(zip(ids, ids[1:]), chosen[1:])]  # noqa: B905
    return Sample(name, 0, 0, "k", "p", tracks=[Track(ids, chosen, [0.0, *rollout])], **fields)


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(teachers, "open_folder", Folder)
    taught_by = [environment(name, teacher=str(a)) for name, a in TEACHERS.items()]
    rl = RLConfig(
        environments=(*taught_by, environment("free")), prompts=3, samples=2, max_tokens=5, template="plain",
        advantage_clip=0.6,
    )  # fmt: skip
    return dataclasses.replace(run_config(SMALL, batch_size=2, sequence_length=9), rl=rl)


def test_advantages_of_tokens_are_the_teachers_judgement(config):
    """Of two domains and one with rewards, packed together; without a verdict too, and within the clip."""
    samples = [
        sample("sums", [0, 1, 2, 0], [False, True, True, True], reward=math.nan, fault="crash: gone"),
        sample("words", [1, 1, 0, 2, 1], [False, False, True, True, True], reward=1.0, advantage=9.0),
        sample("free", [2, 0, 0], [False, True, True], reward=1.0, advantage=0.25),
    ]
    built = assemble(SMALL, config.plan).built
    scorer, policy = Likelihoods(config, built), weights_of(SMALL, built, POLICY)
    made = batch_of(
        samples, config.rl, lambda batch, tracks, at: scorer.of(*policy, batch), reference=None, shape=(2, 9),
        pad_id=0, teachers=Teachers(config, byte_tokenizer()).scores,
    )[0]  # fmt: skip
    found = sorted(made.extras[ADVANTAGE][made.extras[WEIGHT] > 0])
    gaps = {}
    for one in samples[:2]:
        ids, chosen = one.tracks[0].ids, one.tracks[0].chosen
        pairs = [(ids[n - 1], ids[n]) for n in range(1, len(ids)) if chosen[n]]
        a = TEACHERS[one.environment]
        gaps[one.environment] = [log_likelihood(a, *pair) - log_likelihood(POLICY, *pair) for pair in pairs]
    clipped = [min(max(gap, -0.6), 0.6) for one in gaps.values() for gap in one]
    assert clipped != [gap for one in gaps.values() for gap in one] and any(abs(gap) < 0.6 for gap in clipped)
    np.testing.assert_allclose(found, sorted([*clipped, 0.25, 0.25]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made.extras[IMPORTANCE][made.extras[WEIGHT] > 0], 1, rtol=1e-5)
    assert samples[0].divergence == pytest.approx(-sum(gaps["sums"]), rel=1e-5)
    assert samples[2].divergence is None and samples[2].advantage == 0.25
    told = measured(samples, [[one] for one in samples], Mismatch(), config.rl)
    assert told["teacher_divergence/words"] == pytest.approx(-np.mean(gaps["words"]), rel=1e-5)
    assert told["teacher_divergence"] == pytest.approx(-np.mean([*gaps["sums"], *gaps["words"]]), rel=1e-5)
    assert "teacher_divergence/free" not in told and told["zero_gradient_groups"] == 0


def test_the_expected_gradient_is_that_of_the_reverse_divergence():
    """Over all tokens after 0, Σ π (log π_T - log π) ∇ log π = -∇ KL(π || π_T), which finite differences give."""
    likelihood = lambda a: np.exp([log_likelihood(a, 0, token) for token in range(3)])  # noqa: E731
    divergence = lambda a: float(np.sum(likelihood(a) * np.log(likelihood(a) / likelihood(2.0))))  # noqa: E731
    step = 1e-5
    slope = (np.log(likelihood(POLICY + step)) - np.log(likelihood(POLICY - step))) / (2 * step)
    advantage = taught(np.log(likelihood(2.0)), np.log(likelihood(POLICY)))
    expected = -(divergence(POLICY + step) - divergence(POLICY - step)) / (2 * step)
    assert np.sum(likelihood(POLICY) * advantage * slope) == pytest.approx(expected, rel=1e-6) != 0


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused(config, monkeypatch):
    made = Teachers(dataclasses.replace(config, model=dataclasses.replace(SMALL, vocab_size=4)), byte_tokenizer())
    with pytest.raises(ConfigError, match="ModelConfig.vocab_size is 4; expected 3, the teacher's"):
        made.fingerprints(lambda *of: "")
    monkeypatch.setattr(teachers, "open_folder", lambda path: Folder(path, lambda: None))
    with pytest.raises(ConfigError, match="the teacher '2.0' has another tokenizer than the run; expected the run's"):
        Teachers(config, byte_tokenizer()).fingerprints(lambda *of: "")


def test_one_answer_per_task_needs_a_teacher_everywhere():
    fields = {"prompts": 2, "samples": 1, "max_tokens": 3, "template": "plain"}
    RLConfig(environments=(environment("a", teacher="x"),), **fields)
    with pytest.raises(ConfigError, match="RLConfig.samples is 1; expected at least 2, where there are rewards"):
        RLConfig(environments=(environment("a", teacher="x"), environment("b")), **fields)
    with pytest.raises(ConfigError, match="EnvironmentConfig.teacher is ''; expected a non-empty string, or None"):
        environment("a", teacher="")


RECIPE = (
    MODEL
    + """
DataConfig.corpus = 'environments'
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.0
DataConfig.tuning_fraction = 0.0
RLConfig.environments = (@digits/EnvironmentConfig(),)
digits/EnvironmentConfig.name = 'digits'
digits/EnvironmentConfig.kind = 'synthetic'
digits/EnvironmentConfig.family = 'parity'
digits/EnvironmentConfig.examples = 8
RLConfig.prompts = 8
RLConfig.max_tokens = 4
RLConfig.template = 'plain'
RLConfig.overlong = 'keep'
RLConfig.slots = 8
RLConfig.workers = 1
TrainConfig.batch_size = 4
TrainConfig.sequence_length = 32
TrainConfig.checkpoint_every = 1
TrainConfig.sample_tokens = 1
TrainConfig.loggers = ()
OptimizerConfig.learning_rate = 1e-2
OptimizerConfig.schedule = 'constant'
"""
)


def test_a_run_learns_from_its_teacher_and_knows_it_again(tmp_path, capsys):
    """One answer per task is enough; a run does not go on with another teacher in its place."""
    recipe = tmp_path / "rl.gin"
    recipe.write_text(RECIPE)

    def run(name, seed, steps, *bindings, resume=()):
        binds = bound(f"TrainConfig.seed = {seed}", f"TrainConfig.steps = {steps}", *bindings)
        return main(["rl", "--gin_file", str(recipe), "--run", str(tmp_path / name), *binds, *resume])

    taught_by = lambda name: f"digits/EnvironmentConfig.teacher = {str(tmp_path / name)!r}"  # noqa: E731
    assert run("teacher", 1, 1, "RLConfig.samples = 2") == 0
    assert run("student", 3, 1, "RLConfig.samples = 1", taught_by("teacher")) == 0
    (line,) = read_metrics(tmp_path / "student")
    rows = (tmp_path / "student" / "rollouts" / "00000000.jsonl").read_text().splitlines()
    advantages = [json.loads(row)["advantage"] for row in rows]
    assert len(advantages) == 8 and all(advantages) and line["zero_gradient_groups"] == 0
    tokens = sum(json.loads(row)["tokens"] for row in rows)
    assert line["teacher_divergence"] == pytest.approx(-sum(advantages) / tokens)
    assert line["objective"] == pytest.approx(line["teacher_divergence"], rel=1e-3) and line["grad_norm"] > 0
    capsys.readouterr()
    assert run("student", 3, 2, "RLConfig.samples = 1", taught_by("student"), resume=("--resume",)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "the position is of" in error
