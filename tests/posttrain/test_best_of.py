"""The best of several answers, with an engine that says what it is told."""

import contextlib
import json
from types import SimpleNamespace

from tests.infer.chats import tokenizer

from orogen.infer.chat import Chat, own_template
from orogen.infer.request import ERROR, Output
from orogen.posttrain.best_of import Best, best_of, write_best
from orogen.posttrain.chats import places_of, read_lines
from orogen.posttrain.conversations import Conversation

ASKED = [Conversation([{"role": "user", "content": text}]) for text in ("one", "two", "three")]


def parse(line, where):
    return line


def test_answers_name_the_line_and_the_file_that_they_answer(tmp_path):
    """Empty lines are counted; in a folder, each file has lines of its own."""
    for name, text in (("a", '\n{"a": 1}\n \n\n{"a": 2}\n'), ("b", '{"a": 3}\n')):
        (tmp_path / f"{name}.jsonl").write_text(text)

    def named(path):
        places = places_of(dict(read_lines(path, parse)), path)
        best = [Best(None, None, ()) for _ in places]
        kept = map(json.loads, write_best(best, places).decode().splitlines())
        return [{name: one[name] for name in one if name in ("file", "line")} for one in kept]

    assert named(tmp_path / "a.jsonl") == [{"line": 2}, {"line": 5}]
    of_folder = [("a.jsonl", 2), ("a.jsonl", 5), ("b.jsonl", 1)]
    assert named(tmp_path) == [{"file": file, "line": line} for file, line in of_folder]


def test_the_highest_reward_is_kept_and_failures_are_counted(tmp_path):
    said = ["a", "bbb</think>cc", "", "dd", "d", "ee", "", "e", "f"]
    requests = []

    def run(given):
        requests.extend(given)
        return [
            [Output(n, text=text[:1]), Output(n, text=text[1:], finish=ERROR if n == 7 else "stop")]
            for n, text in enumerate(said)
        ]

    seen = []

    def reward(conversations):
        seen.extend(conversations)
        values = {"a": 5.0, "cc": float("nan"), "dd": 2.0, "ee": 2.0, "d": 1.0, "f": float("nan")}
        last = [one.messages[-1] for one in conversations]
        return [values[m["content"] or m["reasoning_content"]] for m in last]

    with contextlib.closing(Chat(tokenizer(), own_template("nemotron_3_nano"))) as chat:
        fields = {"max_tokens": 4, "temperature": 0.5}
        found = best_of(SimpleNamespace(run=run), chat, ASKED, reward, count=3, fields=fields, seed=40)
    assert [request.sampling.seed for request in requests] == list(range(40, 49))
    assert all(request.max_tokens == 4 and request.sampling.temperature == 0.5 for request in requests)
    assert requests[0].prompt == requests[2].prompt != requests[3].prompt
    # The prompt opens a thought: what comes before `</think>` is reasoning.
    assert [m["content"] for m in (one.messages[-1] for one in seen)] == ["", "cc", "", "", "", ""]
    assert seen[1].messages[-1]["reasoning_content"] == "bbb" and seen[1].messages[0] == ASKED[0].messages[0]
    assert [one.rewards for one in found] == [(5.0, None, None), (2.0, 1.0, 2.0), (None, None, None)]
    assert found[0].message["reasoning_content"] == "a" and found[1].reward == 2.0
    assert found[1].message["reasoning_content"] == "dd"  # the first of two that are equal
    assert found[2].message is None and found[2].reward is None
    (tmp_path / "asked.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    keys = [key for key, _ in read_lines(tmp_path / "asked.jsonl", parse)]
    lines = write_best(found, places_of(keys, tmp_path / "asked.jsonl")).decode().splitlines()
    assert lines[2] == '{"line": 3, "message": null, "reward": null, "rewards": [null, null, null]}'
