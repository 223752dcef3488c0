"""`orogen rl` on a tiny model: records, tables, resuming to the bit, and what is refused."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tests.helpers import MODEL, bound
from tests.train.kills import TIMED

from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.rl import EnvironmentConfig
from orogen.model.lm import initial_state
from orogen.posttrain import rl, rollout
from orogen.posttrain.environments.pool import Pool
from orogen.posttrain.rl import make_rl
from orogen.report.metrics import read_metrics
from orogen.train.run import train

RECIPE = (
    MODEL
    + """
DataConfig.corpus = 'environments'
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.2
DataConfig.tuning_fraction = 0.0
RLConfig.environments = (@digits/EnvironmentConfig(), @desk/EnvironmentConfig())
digits/EnvironmentConfig.name = 'digits'
digits/EnvironmentConfig.kind = 'synthetic'
digits/EnvironmentConfig.family = 'parity'
digits/EnvironmentConfig.examples = 12
digits/EnvironmentConfig.partial_credit = 0.5
digits/EnvironmentConfig.share = 3.0
desk/EnvironmentConfig.name = 'desk'
desk/EnvironmentConfig.kind = 'instructions'
desk/EnvironmentConfig.examples = 12
RLConfig.prompts = 4
RLConfig.samples = 3
RLConfig.max_tokens = 4
RLConfig.template = 'plain'
RLConfig.overlong = 'keep'
RLConfig.updates = 2
RLConfig.slots = 3
RLConfig.workers = 1
RLConfig.table_rows = 5
TrainConfig.steps = 4
TrainConfig.batch_size = 4
TrainConfig.sequence_length = 96
TrainConfig.seed = 1
TrainConfig.evaluate_every = 2
TrainConfig.evaluate_rows = 2
TrainConfig.checkpoint_every = 1
TrainConfig.keep_checkpoints = 5
TrainConfig.sample_tokens = 1
TrainConfig.loggers = ()
OptimizerConfig.learning_rate = 1e-2
OptimizerConfig.schedule = 'constant'
"""
)
CLOCKS = {"rollout_ms", "verify_ms", "score_ms", "rollout_tokens_per_second", *TIMED}


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "rl.gin"
    file.write_text(RECIPE)
    return file


def run(recipe, folder, *bindings, resume=False):
    config, text = load([recipe], bindings)
    found = train(config, text, folder, make_rl(config.rl, None, folder), resume=resume, log=lambda line: None)
    found.corpus.rollouts.close()
    lines = read_metrics(folder)
    return found, [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def test_a_run_goes_on_to_the_bit_and_counts_no_sample_twice(recipe, tmp_path):
    """Also between two updates of one rollout, whose second batch no later weights could write again; and after a
    kill that lost the last checkpoint but not its records."""
    whole, lines = run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "parts", "TrainConfig.steps = 3")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "3")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "2")
    parts, again = run(recipe, tmp_path / "parts", resume=True)
    assert again == lines
    for one, other in zip(jax.tree.leaves(whole.state.params), jax.tree.leaves(parts.state.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    tables = sorted((tmp_path / "whole" / "rollouts").iterdir())
    assert [file.name for file in tables] == ["00000000.jsonl", "00000001.jsonl"]
    for file in tables:
        assert file.read_bytes() == (tmp_path / "parts" / "rollouts" / file.name).read_bytes()
    check_records(lines, [json.loads(line) for file in tables for line in file.read_text().splitlines()])


def check_records(lines, samples):
    first, second, third, _ = lines
    assert {"reward", "reward/digits", "reward/desk", "answer_tokens/desk", "mismatch_max", "entropy"} <= first.keys()
    assert "reward" not in second and "reward" in third  # one rollout for two updates
    assert first["clipped"] == 0 and first["mismatch_max"] < 1e-4 and 0 <= first["zero_gradient_groups"] <= 1
    assert {"heldout_failure", "heldout_reward", "heldout_reward/digits", "heldout_reward/desk"} <= second.keys()
    assert second["heldout_failure"] == pytest.approx(1 - second["heldout_reward"])
    assert len(samples) == 10 and {row["environment"] for row in samples} == {"digits", "desk"}
    assert all(row["tokens"] <= 4 and row["reward"] == sum(row["rewards"].values()) for row in samples)


def test_exact_rollouts_and_their_trainer_differ_by_nothing(recipe, tmp_path):
    """In float32 on one plan; the gradient's own pass over packed rows differs by rounding."""
    bindings = ("RLConfig.exact = True", "RLConfig.updates = 1", "TrainConfig.steps = 2", "RLConfig.prompts = 2")
    _, lines = run(recipe, tmp_path / "exact", *bindings)
    assert [(line["mismatch_max"], line["mismatch_mean"]) for line in lines] == [(0, 0), (0, 0)]
    assert all(0 < line["gap"] < 1e-4 for line in lines)


def test_bfloat16_differs_little(recipe, tmp_path):
    bindings = ("TrainConfig.compute_dtype = 'bfloat16'", "RLConfig.updates = 1", "TrainConfig.steps = 1")
    _, (line,) = run(recipe, tmp_path / "bfloat16", *bindings)
    assert 0 < line["mismatch_max"] <= 0.02


def test_other_environments_do_not_go_on(recipe, tmp_path, capsys):
    once = ["rl", "--gin_file", str(recipe), "--run", str(tmp_path / "run"), *bound("TrainConfig.steps = 1")]
    assert main(once) == 0
    opened = open_model(tmp_path / "run")
    assert opened.tokenizer is not None and (tmp_path / "run" / "report.html").is_file()
    capsys.readouterr()
    assert main([*once[:-1], "TrainConfig.steps = 2", "--resume", *bound("desk/EnvironmentConfig.seed = 5")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["DataConfig.corpus = 'stdlib'"], "DataConfig.corpus is 'stdlib'; expected 'environments'"),
        (
            ["RLConfig.max_tokens = 96"],
            "RLConfig.max_tokens is 96; expected less than TrainConfig.sequence_length = 96",
        ),
        (
            ["PrecisionConfig.recipe = 'mxfp8'"],
            "PrecisionConfig.recipe is 'mxfp8'; expected 'plain': rollouts and the trainer's log-probabilities",
        ),
        (["RLConfig.kl = 0.1"], "RLConfig.kl is 0.1; expected --checkpoint DIR too"),
        (["digits/EnvironmentConfig.examples = 1"], "environment 'digits' has no task to train on"),
        (["TrainConfig.batch_ramp = (2, 2, 10)"], "TrainConfig.batch_ramp is (2, 2, 10); expected None"),
        (["DataConfig.tokenizer = 'bpe'", "DataConfig.vocab_size = 259"], "DataConfig.tokenizer is 'bpe'; expected"),
        (["TrainConfig.sequence_length = 8", "RLConfig.max_tokens = 2"], "has a prompt of"),
        (["digits/EnvironmentConfig.family = 'chess'"], "EnvironmentConfig.family is 'chess'; expected one of"),
        (["EngineConfig.slots = 3"], "bindings that nothing read: EngineConfig.slots"),
        (["OptimizerConfig.frozen = ('router',)"], "OptimizerConfig.frozen has 'router'; expected the model's modules"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(recipe, tmp_path, capsys, bindings, message):
    command = ["rl", "--gin_file", str(recipe), "--run", str(tmp_path / "run"), *bound(*bindings)]
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_another_task_has_no_environments(recipe, tmp_path, capsys):
    assert main(["train", "--gin_file", str(recipe), "--run", str(tmp_path / "run")]) == 2
    assert "RLConfig has bindings; expected none: this task has no environments" in capsys.readouterr().err


class Folder:
    """A checkpoint whose weights a seed decides."""

    def __init__(self, model, seed):
        self.model, self.seed = model, seed

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, built, plan, dtype):
        return tuple(map(built.laid, initial_state(self.model, self.seed)))


def test_a_run_does_not_go_on_with_another_reference(recipe, tmp_path, monkeypatch):
    config, _ = load([recipe], ["RLConfig.kl = 0.1"])
    monkeypatch.setattr(rl, "open_folder", lambda origin: Folder(config.model, int(origin.name)))
    corpus = make_rl(config.rl, None, tmp_path).open(config, None)
    source_of = lambda seed: make_rl(config.rl, tmp_path / seed, tmp_path).source(config, corpus)  # noqa: E731
    position = json.loads(json.dumps(source_of("3").state()))
    source_of("3").restore(position)
    with pytest.raises(ConfigError, match="seed and the model of KL must be those of the run"):
        source_of("4").restore(position)
    corpus.close()


def test_a_run_goes_on_with_its_servers_elsewhere(recipe):
    """Or without the one that wrote its rollouts."""
    config, _ = load([recipe])
    gym = EnvironmentConfig(name="g", kind="nemo_gym", corpus="c.jsonl", url="http://a:1")
    corpus = SimpleNamespace(content_hash="h", tokenizer=SimpleNamespace(fingerprint="f"))

    def identity(url, samples=3, **server):
        environments = (dataclasses.replace(gym, url=url),)
        one = dataclasses.replace(config.rl, environments=environments, samples=samples, **server)
        return rl._identity(dataclasses.replace(config, rl=one), corpus)

    here = identity("http://a:1")
    assert (
        identity("https://b:2", server="http://c:3", server_weights="/d", server_retries=1)
        == here
        != identity("http://a:1", 4)
    )


def test_verifying_processes_end_with_the_command(recipe, tmp_path, monkeypatch, capsys):
    """Also when the run fails."""
    pools = []
    monkeypatch.setattr(rollout, "Pool", lambda *one, **more: pools.append(Pool(*one, **more)) or pools[-1])
    bindings = bound("TrainConfig.sequence_length = 8", "RLConfig.max_tokens = 2")
    assert main(["rl", "--gin_file", str(recipe), "--run", str(tmp_path / "run"), *bindings]) == 2
    assert len(pools) == 2 and all(worker._process is None for pool in pools for worker in pool._all)
