"""A run with two sources and phases: its schedule, its records, and the same bits after a stop."""

import json

import numpy as np
import pytest
from tests.helpers import MODEL

from orogen.config.load import load
from orogen.config.run import OptimizerConfig
from orogen.report.metrics import read_metrics
from orogen.train.optimizer import learning_rate
from orogen.train.pretraining import PRETRAINING, batches_until
from orogen.train.run import train

SETTINGS = f"""{MODEL}
TrainConfig.evaluate_every = 6
TrainConfig.sequence_length = 24
DataConfig.tuning_fraction = 0.0
TrainConfig.seed = 3
TrainConfig.steps = 7
DataConfig.heldout_fraction = 0.3
TrainConfig.batch_size = 4
DataConfig.tokenizer = 'byte'
TrainConfig.evaluate_rows = 4
TrainConfig.loggers = ()
TrainConfig.phases = (@second/PhaseConfig(),)
second/PhaseConfig.after = 4
second/PhaseConfig.weights = {{'b': 1.0}}
second/PhaseConfig.sequence_length = 48
second/PhaseConfig.batch_size = 2
second/PhaseConfig.learning_rate = 1e-4
OptimizerConfig.learning_rate = 3e-3
OptimizerConfig.schedule = 'constant'
"""
TIMED = ("step_ms", "tokens_per_second", "compile_seconds", "evaluate_seconds", "save_seconds", "start_seconds")


def test_a_phase_sets_the_rate_and_the_schedule_ends_before_it():
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", decay_steps=4, min_ratio=0.2)
    rate = learning_rate(config, steps=20, rates=((8, 0.05), (12, 0.5)))
    # 1 - sqrt(progress) over the four updates before the phase, from 1 to 0.2.
    falling = [0.2 + 0.8 * (1 - (n / 4) ** 0.5) for n in range(4)]
    expected = [1.0] * 4 + falling + [0.05] * 4 + [0.5] * 8
    np.testing.assert_allclose([float(rate(step)) for step in range(20)], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two sources; after four steps only the second one, in longer rows at another rate."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    text = f"DataConfig.sources = (@a/SourceConfig(), @b/SourceConfig())\n{SETTINGS}"
    for name, letters, weight in (("a", "abc ", 0.75), ("b", "xyz ", 0.25)):
        texts = ("".join(rng.choice(list(letters), int(90 * rng.random()) + 2)) for _ in range(60))
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        fields = {"name": name, "corpus": str(root / f"{name}.jsonl"), "weight": weight}
        text += "".join(f"{name}/SourceConfig.{field} = {value!r}\n" for field, value in fields.items())
    (root / "a.gin").write_text(text)
    return root / "a.gin"


def records(folder):
    return [{k: v for k, v in record.items() if k not in TIMED} for record in read_metrics(folder)]


def test_a_run_through_a_phase_records_it_and_continues_to_the_bit(recipe, tmp_path):
    def run(folder, *bindings, resume=False):
        config, text = load([recipe], bindings)
        train(config, text, tmp_path / folder, PRETRAINING, resume=resume, log=lambda line: None)
        return config

    config = run("whole")
    run("parts", "TrainConfig.steps = 5")
    run("parts", resume=True)
    parts = records(tmp_path / "parts")
    parts[4] = {k: v for k, v in parts[4].items() if "heldout" not in k}  # the shorter run scored its last step
    assert parts == records(tmp_path / "whole")
    found = records(tmp_path / "whole")
    assert [record["phase"] for record in found] == [0] * 4 + [1] * 3
    assert [round(record["learning_rate"], 9) for record in found] == [3e-3] * 4 + [1e-4] * 3
    assert all(abs(record["share/a"] - 0.75) < 48 / record["tokens"] for record in found[:4])
    assert [record["share/b"] for record in found[4:]] == [1.0] * 3
    assert found[6]["heldout_loss/a"] > 0 and {"heldout_bits_per_byte/b", "whole_heldout_loss/a"} <= found[6].keys()
    low, high = sorted(found[6][f"whole_heldout_loss/{name}"] for name in "ab")
    assert low < found[6]["whole_heldout_loss"] < high
    assert all(record["tokens_per_second"] > 0 for record in read_metrics(tmp_path / "whole"))
    corpus = PRETRAINING.open(config, None)
    shapes = [batch.tokens_bt.shape for batch in batches_until(config, corpus, 7)]
    assert shapes == [(4, 24)] * 4 + [(2, 48)] * 3
