"""`orogen generate`: what its options ask for, on an engine of a tiny checkpoint."""

import argparse
import contextlib
import io
import json
from pathlib import Path

import pytest

from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.infer.engine import Engine
from orogen.infer.lines import request_of
from orogen.infer.options import add_request_options, fields_of
from orogen.infer.request import Budget, Grammar, Request, Sampling

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "checkpoints" / "whole"
GREEDY = ("--tokens", "9", "--temperature", "0")


def asked(*options: str) -> dict:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    parser.add_argument("--max_tokens", type=int, dest="tokens")
    add_request_options(parser)
    return fields_of(parser.parse_args(options))


def generated(*options: str) -> dict:
    """What the command answers as JSON."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["generate", "--checkpoint", str(CHECKPOINT), *options, "--json"]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def greedy() -> dict:
    return generated("--prompt", "import ", *GREEDY, "--logprobs", "2")


def test_every_setting_of_a_request_has_an_option(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "integer"}')
    fields = asked(
        "--max_tokens", "7", "--temperature", "0.5", "--top_k", "3", "--top_p", "0.25", "--min_p", "0.125",
        "--presence_penalty", "1", "--frequency_penalty", "-1", "--repetition_penalty", "1.5", "--logit_bias", "4=-2",
        "--logit_bias", "5=1.5", "--seed", "9", "--stop", "a", "--stop", "b", "--stop_ids", "6", "--ignore_eos",
        "--min_tokens", "3", "--logprobs", "2", "--budget", "8", "--budget_form", "grace",
        "--json_schema", str(tmp_path / "schema.json"),
    )  # fmt: skip
    assert request_of([1], json.loads(json.dumps(fields))) == Request(
        prompt=(1,), max_tokens=7, stop=("a", "b"), stop_ids=(6,), min_tokens=3, ignore_eos=True, logprobs=2,
        budget=Budget(tokens=8, form="grace"), grammar=Grammar(kind="json_schema", text='{"type": "integer"}'),
        sampling=Sampling(
            temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, presence_penalty=1, frequency_penalty=-1,
            repetition_penalty=1.5, logit_bias=((4, -2.0), (5, 1.5)), seed=9,
        ),
    )  # fmt: skip


def test_options_that_are_not_given():
    fields = asked()
    assert fields["max_tokens"] is None
    assert request_of([1], fields | {"max_tokens": 1}) == Request(
        prompt=(1,), max_tokens=1, sampling=Sampling(temperature=0.8, top_p=0.95, seed=0)
    )
    assert asked("--regex", "a")["grammar"] == {"kind": "regex", "text": "a"}
    assert asked("--budget", "3")["budget"] == {"tokens": 3, "form": "hard"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--json_schema", "x"], "--regex and --json_schema: expected one of them"),
        (["--budget_form", "hard"], "--budget_form hard without --budget; expected both"),
        (["--budget", "-1"], "--budget is -1; expected 0 or more"),
        (["--logprobs", "21"], "--logprobs is 21; expected None, or from 0 to 20"),
        (["--stop", ""], "--stop is ('',); expected at most 16 texts, not empty"),
        (["--stop", "\udcff"], "--stop '\\udcff'; expected valid UTF-8"),
        (["--top_k", "-1"], "--top_k is -1; expected 0 or more"),
        (["--min_tokens", "9", "--max_tokens", "8"], "--min_tokens is 9; expected 0 to max_tokens, 8"),
    ],
)
def test_options_that_say_nothing_sensible(options, message):
    with pytest.raises(ConfigError) as caught:
        asked(*options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--chat"], "--prompt, --chat, --input with --out: expected one of them"),
        (["--prompt", "a", "--logprobs", "1"], "--logprobs 1; expected --json or --input with it"),
        (["--chat", "--json"], "--chat with --json; expected one of them"),
        (["--gin_bindings", "EngineConfig.slot=1"], "gin: Configurable 'EngineConfig' doesn't have a parameter named"),
        (
            ["--gin_bindings", "ModelConfig.vocab_size=9"],
            "bindings that nothing read: ModelConfig.vocab_size; expected",
        ),
        (["--gin_bindings", "EngineConfig.slots='a'"], "EngineConfig.slots is 'a'; expected a value of type int"),
        (
            ["--json_schema", "none.json"],
            "--json_schema 'none.json': No such file or directory; expected a file with a JSON schema",
        ),
    ],
)
def test_what_is_refused_before_a_model_is_read(refused, options, message):
    assert refused("generate", "--checkpoint", "absent", *options).startswith(message)


def test_one_prompt_is_answered_as_by_an_engine(greedy):
    opened = open_model(CHECKPOINT)
    prompt = opened.tokenizer.prompt_ids("import ")
    one = Request(prompt=tuple(prompt), max_tokens=9, sampling=Sampling(temperature=0, seed=0), logprobs=2)
    (outputs,) = Engine(opened, EngineConfig(slots=1, max_length=64, written_out=False)).run([one])
    tokens = [token for output in outputs for token in output.tokens]
    assert greedy["tokens"] == [token.id for token in tokens]
    assert greedy["text"] == "".join(output.text for output in outputs)
    assert greedy["logprobs"] == pytest.approx([token.logprob for token in tokens], abs=1e-5)
    assert [[i for i, _ in top] for top in greedy["top"]] == [[i for i, _ in token.top] for token in tokens]
    assert (greedy["prompt"], greedy["finish"]) == ("import ", outputs[-1].finish)


def test_a_plan_and_an_engine_by_bindings_answer_alike(greedy):
    bound = ("PlanConfig.data=2", "EngineConfig.steps=4", "EngineConfig.written_out=False")
    found = generated("--prompt", "import ", *GREEDY, *(a for b in bound for a in ("--gin_bindings", b)))
    assert found == {key: value for key, value in greedy.items() if key not in ("logprobs", "top")}


def test_a_regular_expression_holds():
    found = generated("--prompt", "a", "--tokens", "9", "--regex", "[0-3]{4}", "--temperature", "3")
    assert found["finish"] == "stop" and len(found["text"]) == 4 and set(found["text"]) <= set("0123")


def test_a_conversation(greedy, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("import \n"))
    assert main(["generate", "--checkpoint", str(CHECKPOINT), "--chat", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out == greedy["text"] + "\n"
    assert "[9 tokens" in err.splitlines()[-1]


def test_messages_go_through_the_chat_template(tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    prompt = open_model(CHECKPOINT).tokenizer.encode("[user] ab\n[tool] c\n").tolist()
    messages = [{"role": "user", "content": "ab"}, {"role": "tool", "content": [{"type": "text", "text": "c"}]}]
    lines = [{"messages": messages}, {"prompt": prompt}, {"messages": [{"role": "cook", "content": "a"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line | {"seed": 1}) + "\n" for line in lines))
    files = ("--input", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--tokens", "5")
    template = ("--chat_template", str(tmp_path / "chat.jinja"))
    assert main(["generate", "--checkpoint", str(CHECKPOINT), *files, *template]) == 2
    chat, plain, broken = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert chat["tokens"] == plain["tokens"] and len(chat["tokens"]) == 5
    assert "messages[0].role is 'cook'; expected one of" in broken["error"]


def test_a_conversation_goes_through_the_chat_template(tmp_path, monkeypatch):
    seen = []

    def converse(engine, words, fields, **_) -> int:
        seen.append((words.render([{"role": "user", "content": "ab"}]), words.fields, fields["max_tokens"]))
        return 0

    (tmp_path / "chat.jinja").write_text("[{{ messages[0].content }}]")
    monkeypatch.setattr("orogen.infer.engine.Engine", lambda opened, config: None)
    monkeypatch.setattr("orogen.infer.terminal.converse", converse)
    options = ("--chat", "--chat_template", str(tmp_path / "chat.jinja"))
    assert main(["generate", "--checkpoint", str(CHECKPOINT), *options]) == 0
    assert seen == [(open_model(CHECKPOINT).tokenizer.encode("[ab]").tolist(), {"shown": ()}, None)]


def test_a_terminal_begins_a_conversation(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("orogen.infer.command._converse", lambda options, fields: 7)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert main(["generate", "--checkpoint", "x"]) == 7
    assert main(["generate", "--checkpoint", "x", "--prompt", ""]) == 2
