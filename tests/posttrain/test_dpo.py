"""`orogen dpo` on a tiny model and a few pairs: what it starts from, goes on with, and refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from tests.helpers import bound, hybrid, write_recipe
from tests.posttrain.test_pairs import pair, write
from tests.train.kills import TIMED

from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.convert.config import family_of
from orogen.infer.chat import Chat, own_template
from orogen.infer.messages import check_messages
from orogen.layers.documents import documents as make_documents
from orogen.posttrain import chats
from orogen.posttrain.reward import RewardModel
from orogen.report.metrics import read_metrics

PAIRS = [
    "PreferenceConfig.template = 'nemotron_3_nano'",
    "TrainConfig.steps = 4",
    "TrainConfig.sequence_length = 280",
    "TrainConfig.sample_tokens = 1",
    "TrainConfig.evaluate_every = 2",
    "TrainConfig.checkpoint_every = 2",
    "OptimizerConfig.learning_rate = 1e-2",
    "OptimizerConfig.schedule = 'constant'",
    "ModelConfig.pattern = '*'",
    "ModelConfig.intermediate_size = None",
]
REWARDS = ("PreferenceConfig.loss = 'bradley_terry'", "ModelConfig.score_head = True")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run of four steps, `whole`, and the function that makes runs there."""
    folder = tmp_path_factory.mktemp("dpo")
    recipe = write_recipe(folder)
    pairs = write(folder / "pairs", *(pair(n, good="short", bad="quite long and wrong") for n in range(24)))

    def run(name, *bindings, resume=False, checkpoint=None):
        more = [*(["--resume"] if resume else []), *(["--checkpoint", str(checkpoint)] if checkpoint else [])]
        given = bound(*PAIRS, f"DataConfig.corpus = {str(pairs)!r}", *bindings)
        return main(["dpo", "--gin_file", str(recipe), "--run", str(folder / name), "--json", *given, *more])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chats, "RENDERERS", 1)  # starting four processes takes longer than what they render here
        assert run("whole") == 0
        yield folder, run


def lines(folder):
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read_metrics(folder)]


def test_the_first_step_has_no_margin_and_later_ones_tell_the_answers_apart(runs):
    folder, _ = runs
    found = lines(folder / "whole")
    assert found[0]["objective"] == pytest.approx(np.log(2), abs=1e-4) and abs(found[0]["margin"]) < 1e-4
    assert found[-1]["accuracy"] == 1 and found[-1]["margin"] > 0.05 and found[-1]["heldout_accuracy"] == 1
    assert found[-1]["whole_heldout_preference_loss"] < 0.69 and "loss" not in found[0]
    facts = json.loads((folder / "whole" / "env.json").read_text())["data"]
    assert (folder / "whole" / "pairs.png").is_file() and "Pairs of answers" in (
        folder / "whole" / "report.html"
    ).read_text()
    assert facts["pairs"] == 24 and facts["equal"] == 0 and (folder / "whole" / "chat_template.jinja").is_file()


def test_a_run_that_was_killed_goes_on_to_the_bit_with_the_reference_it_kept(runs):
    folder, run = runs
    killed = shutil.copytree(folder / "whole", folder / "killed")
    shutil.rmtree(killed / "checkpoints" / "4")
    (kept,) = (killed / "reference").iterdir()
    files = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert {file.name for file in files} == {"train-00000.npy", "heldout-00000.npy"}
    assert run("killed", resume=True) == 0
    assert lines(killed) == lines(folder / "whole") and len(lines(killed)) == 4
    assert files == {file: file.stat().st_mtime_ns for file in kept.iterdir()}


def test_a_reward_model_starts_from_a_language_model_and_keeps_its_head(runs, capsys):
    folder, run = runs
    assert run("reward", *REWARDS, checkpoint=folder / "whole") == 0
    found = lines(folder / "reward")
    assert found[0]["preference_loss"] > 0 and "sft_loss" not in found[0]
    one, other = open_model(folder / "whole"), open_model(folder / "reward")
    # The head of the vocabulary has no gradient, and weight decay of at most 1e-3.
    np.testing.assert_allclose(
        other.params["head"]["weight"][...], one.params["head"]["weight"][...], rtol=1e-2, atol=1e-6
    )
    assert np.std(other.params["score"]["weight"][...]) > 0.05 and not (folder / "reward" / "reference").exists()
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(other.params))


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["PreferenceConfig.loss = 'bradley_terry'"], "ModelConfig.score_head is False; expected True"),
        (["PreferenceConfig.loss = 'simpo'"], "PreferenceConfig.loss is 'simpo'; expected one of dpo, ipo, bradley"),
        (["PreferenceConfig.loss = 'ipo'", "PreferenceConfig.label_smoothing = 0.1"], "since nothing reads it"),
        (["PreferenceConfig.preference_weight = 0.0"], "PreferenceConfig.preference_weight is 0.0; expected a number"),
        (["PreferenceConfig.beta = 0.0"], "PreferenceConfig.beta is 0.0; expected a number above 0"),
        (["TrainConfig.ngram_order = 2"], "TrainConfig.ngram_order is 2; expected 0 here"),
        (["ChatConfig.template = 'nemotron_3_nano'"], "ChatConfig has bindings; expected none"),
    ],
)
def test_what_dpo_cannot_use_is_refused_in_one_line(runs, capsys, bindings, message):
    folder, run = runs
    assert run("refused", *bindings) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (folder / "refused").exists()


def test_rewards_of_conversations_and_the_best_of_several_answers(runs, capsys):
    """Needs the reward model of an earlier test, or trains it."""
    folder, run = runs
    if not (folder / "reward").exists():
        assert run("reward", *REWARDS, checkpoint=folder / "whole") == 0
    said = [("a", "b"), ("question", "an answer that is longer"), ("a", "b")]
    records = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in said]
    write(folder / "said", *records)
    spaced = folder / "said" / "pairs.jsonl"
    spaced.write_text("\n" + spaced.read_text())  # an empty line has no reward
    files = ["--input", str(folder / "said" / "pairs.jsonl"), "--out", str(folder / "rewards.jsonl")]
    capsys.readouterr()
    assert main(["reward", "--checkpoint", str(folder / "reward"), *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conversations"] == 3
    written = [json.loads(text) for text in (folder / "rewards.jsonl").read_text().splitlines()]
    assert [one["line"] for one in written] == [2, 3, 4]
    rewards = [one["reward"] for one in written]
    assert rewards[0] == pytest.approx(rewards[2], abs=1e-5) and rewards[0] != pytest.approx(rewards[1], abs=1e-5)
    # The score by hand: the last token's final hidden state times the head.
    opened = open_model(folder / "reward")
    chat = Chat(opened.tokenizer, own_template("nemotron_3_nano"))
    ids = chat.prompt(check_messages(records[1]["messages"]), generate=False).ids
    chat.close()
    model = nnx.merge(opened.built.graph, opened.params, opened.buffers)
    tokens_bt = np.array([ids], np.int32)
    hidden, _ = model.hidden(tokens_bt, make_documents(np.ones_like(tokens_bt)), opened.plan)
    expected = np.float64(hidden[0, -1]) @ np.float64(opened.params["score"]["weight"][...])
    assert rewards[1] == pytest.approx(expected, abs=1e-4)

    write(folder / "asked", {"prompt": "question"}, {"messages": [{"role": "user", "content": "another"}]})
    files = ["--input", str(folder / "asked" / "pairs.jsonl"), "--out", str(folder / "best.jsonl")]
    asked = [*files, "--count", "3", "--tokens", "4", "--json"]
    asked += bound("EngineConfig.max_length = 256", "EngineConfig.slots = 2")
    assert main(["best_of", "--checkpoint", str(folder / "whole"), "--reward", str(folder / "reward"), *asked]) == 0
    best = [json.loads(text) for text in (folder / "best.jsonl").read_text().splitlines()]
    assert [one["line"] for one in best] == [1, 2]
    for one in best:
        assert len(one["rewards"]) == 3 and one["reward"] == max(r for r in one["rewards"] if r is not None)
        assert one["message"]["role"] == "assistant"
    assert main(["reward", "--checkpoint", str(folder / "whole"), *files[:2], "--out", str(folder / "x")]) == 2
    assert "pairs.jsonl:1: messages is missing" in capsys.readouterr().err and not (folder / "x").exists()


def test_a_model_without_scores_is_no_reward_model(runs):
    folder, _ = runs
    with pytest.raises(ConfigError, match="ModelConfig.score_head is False; expected True: a reward model"):
        RewardModel(open_model(folder / "whole"), None)


def test_hugging_face_has_no_form_for_a_reward_model():
    with pytest.raises(ConfigError, match="ModelConfig.score_head is True; expected what Hugging Face's nemotron_h"):
        family_of(hybrid(score_head=True, mtp_depths=0, pattern="M*"))
