"""`orogen sft` on a tiny model and a few conversations."""

import json

import numpy as np
import pytest
from tests.helpers import bound, write_recipe
from tests.infer.chats import tokenizer

from orogen.cli import main
from orogen.config.chat import ChatConfig
from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.infer.chat import own_template
from orogen.posttrain.chats import open_chats

NANO = own_template("nemotron_3_nano")


def line(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def write(folder, *records):
    folder.mkdir(exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def opened(folder, *, length=200, **chat):
    data = DataConfig(corpus=str(folder), tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.0)
    return open_chats(data, ChatConfig(template="nemotron_3_nano", **chat), NANO, tokenizer(), length=length)


def streams(corpus):
    return [stream for split in corpus.splits.values() for stream in split]


def test_every_conversation_is_in_one_split_and_the_hash_tells_them_apart(tmp_path):
    records = [line(f"question {n}", f"answer {n}") for n in range(20)]
    one = opened(write(tmp_path / "a", *records))
    assert one.told == (20, 20, 0, 0) and len(one.splits["heldout"]) and len(one.splits["train"])
    assert sorted(b"".join([t]) for s in one.splits.values() for t in s.texts()) == sorted(
        f"answer {n}".encode() for n in range(20)
    )
    records[3]["messages"][1]["content"] = "another"
    assert opened(write(tmp_path / "a", *records)).content_hash != one.content_hash


@pytest.mark.parametrize(("too_long", "kept", "told"), [("drop", 19, (20, 20, 1, 0)), ("cut", 20, (20, 20, 0, 1))])
def test_a_sequence_that_is_too_long_is_dropped_or_cut(tmp_path, too_long, kept, told):
    records = [line(f"question {n}", "x" * (300 if n == 7 else 3)) for n in range(20)]
    corpus = opened(write(tmp_path, *records), length=100, too_long=too_long)
    assert corpus.told == told and len(streams(corpus)) == kept
    assert max(len(stream.tokens_t) for stream in streams(corpus)) <= 100


def test_a_cut_that_leaves_nothing_to_learn_counts_as_dropped(tmp_path):
    records = [line("x" * (300 if n == 7 else 3), f"answer {n}") for n in range(20)]
    corpus = opened(write(tmp_path, *records), length=100, too_long="cut")
    assert corpus.told == (20, 20, 1, 0) and len(streams(corpus)) == 19


def test_another_template_is_another_corpus(tmp_path):
    folder = write(tmp_path, *(line(f"question {n}", f"answer {n}") for n in range(20)))
    data = DataConfig(corpus=str(folder), tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.0)
    hashes = {
        open_chats(data, ChatConfig(template="x"), template, tokenizer(), length=200).content_hash
        for template in (NANO, NANO + " ")
    }
    assert len(hashes) == 2


def test_batches_go_on_to_the_bit_and_only_with_the_same_template(tmp_path):
    folder = write(tmp_path, *(line(f"question {n}", f"answer {n}") for n in range(20)))
    data = DataConfig(corpus=str(folder), tokenizer="byte", heldout_fraction=0.3, tuning_fraction=0.0)

    def loader(template):
        corpus = open_chats(data, ChatConfig(template="x"), template, tokenizer(), length=100)
        return corpus.train_loader(batch_size=2, sequence_length=100, shuffle_seed=1)

    whole, again = loader(NANO), loader(NANO)
    for _ in range(3):
        next(whole)
    position = json.loads(json.dumps(whole.state()))
    again.restore(position)
    for _ in range(4):
        for one, other in zip(next(whole)[:4], next(again)[:4], strict=True):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError):
        loader(NANO + " ").restore(position)


def test_a_split_whose_conversations_are_all_too_long_is_refused(tmp_path):
    records = [line(f"question {n}", f"answer {n}") for n in range(20)]
    with pytest.raises(ConfigError, match=r"split of corpus .* has no sequence of at most"):
        opened(write(tmp_path, *records), length=5)


def test_the_checkpoint_s_own_template_comes_before_ours(tmp_path):
    from orogen.posttrain.sft import template_of

    (tmp_path / "chat_template.jinja").write_text("of the checkpoint")
    assert template_of("checkpoint", tmp_path, tokenizer()) == "of the checkpoint"
    assert template_of("nemotron_3_nano", tmp_path, tokenizer()) == NANO


def test_shares_of_reasoning_are_drawn_the_same_way_in_every_run(tmp_path):
    records = [line("a", f"{n}", reasoning_content="think about it") for n in range(40)]
    folder = write(tmp_path, *records)
    found = [streams(opened(folder, without_reasoning=0.5)) for _ in range(2)]
    short = sum(len(stream.tokens_t) < max(len(s.tokens_t) for s in found[0]) - 3 for stream in found[0])
    assert 8 <= short <= 32
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.tokens_t, other.tokens_t)


def test_the_loss_can_be_on_every_token(tmp_path):
    """But the first, which nothing predicts; also on the end of a thought that is cut short."""
    folder = write(tmp_path, *(line(f"question {n}", f"{n}", reasoning_content="think about it") for n in range(20)))
    spoken, every = (streams(opened(folder, truncated=1.0, **learned)) for learned in ({}, {"learned": "every"}))
    for one, other in zip(spoken, every, strict=True):
        np.testing.assert_array_equal(one.tokens_t, other.tokens_t)
        assert one.weights_t[0] == other.weights_t[0] == 0 and other.weights_t[1:].all()
        assert 0 < one.weights_t.sum() < len(one.weights_t) / 2
    with pytest.raises(ConfigError, match="ChatConfig.learned is 'user'; expected one of assistant, every"):
        ChatConfig(template="x", learned="user")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "chats.jsonl:2 holds list; expected a JSON object"),
        ("{", "chats.jsonl:2: "),
        ('{"messages": []}', "chats.jsonl:2: messages is []; expected at least one"),
        ('{"text": "a"}', "chats.jsonl:2: messages is missing"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message has the role assistant"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
         "messages[1] is empty; expected content, reasoning_content or tool_calls"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "messages[0].role is 'robot'"),
        ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}', "messages[0].content is missing"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}', "tools[0].function"),
    ],
)  # fmt: skip
def test_a_malformed_conversation_is_named(tmp_path, text, message):
    folder = write(tmp_path, line("a", "b"))
    with (folder / "chats.jsonl").open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ConfigError) as caught:
        opened(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_may_be_objects(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    corpus = opened(write(tmp_path, record, *(line(f"{n}", "b") for n in range(20))))
    assert any(b"<parameter=x>\n1\n" in text for split in corpus.splits.values() for text in split.texts())


def test_too_long_can_be_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"chats.jsonl:1 has a sequence of \d+ tokens; expected at most"):
        opened(write(tmp_path, *[line("a", "b" * 300)] * 20), length=50, too_long="refuse")


CHATS = [
    "DataConfig.heldout_fraction = 0.3",
    "ChatConfig.template = 'nemotron_3_nano'",
    "TrainConfig.sequence_length = 144",
    "TrainConfig.sample_tokens = 1",
]


def test_sft_trains_on_what_assistants_say_and_keeps_the_template(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    folder = write(tmp_path / "chats", *(line(f"question {n}", f"answer {n}") for n in range(20)))
    bindings = bound(*CHATS, f"DataConfig.corpus = {str(folder)!r}")
    run = tmp_path / "run"
    assert main(["sft", "--gin_file", str(recipe), "--run", str(run), "--json", *bindings]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert (run / "chat_template.jinja").read_text() == NANO
    facts = json.loads((run / "env.json").read_text())["data"]
    assert facts["conversations"] == 20 and facts["dropped"] == 0
    records = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < records[-1]["loss"] < 12 and records[-1]["whole_heldout_loss"] > 0


@pytest.mark.parametrize(
    ("command", "binding", "message"),
    [
        ("train", CHATS[1], "ChatConfig has bindings; expected none"),
        ("sft", "ChatConfig.template = 'no such file'", "chat template 'no such file' is no file"),
        ("sft", "ChatConfig.template = 'checkpoint'", "the checkpoint has none"),
        ("sft", None, "the gin files have no bindings of ChatConfig"),
        ("sft", "ChatConfig.template = 'nemotron_3_nano'", "corpus/0.txt: expected conversations in .jsonl files"),
    ],
)
def test_what_sft_cannot_use_is_refused_in_one_line(tmp_path, capsys, command, binding, message):
    recipe = write_recipe(tmp_path)
    bindings = bound(*([binding] if binding else []))
    assert main([command, "--gin_file", str(recipe), "--run", str(tmp_path / "run"), *bindings]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
