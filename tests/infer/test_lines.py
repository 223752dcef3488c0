"""Requests from lines of JSON: every field, defaults, seeds, and messages."""

import json

import pytest

from orogen.config.checks import ConfigError
from orogen.infer.lines import Line, LineReader
from orogen.infer.request import Budget, Grammar, Request, Sampling


def line(text: str, number: int = 1) -> Line:
    return Line(number, text.encode(), "")


def test_a_line_sets_every_field_of_a_request():
    text = json.dumps(
        {
            "prompt": [1, 2],
            "max_tokens": 3,
            "stop": ["a"],
            "stop_ids": [4],
            "ignore_eos": True,
            "logprobs": 5,
            "budget": {"tokens": 6, "form": "grace"},
            "grammar": {"kind": "regex", "text": "a*"},
            "priority": -1,
            "temperature": 0,
            "top_k": 7,
            "top_p": 0.5,
            "min_p": 0.25,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "logit_bias": [[8, -1.5]],
            "seed": 9,
            "id": None,
        }  # fmt: skip
    )
    assert LineReader({"max_tokens": 99, "top_k": 99}).read(line(text)) == Request(
        prompt=(1, 2), max_tokens=3, stop=("a",), stop_ids=(4,), ignore_eos=True, logprobs=5,
        budget=Budget(tokens=6, form="grace"), grammar=Grammar(kind="regex", text="a*"), priority=-1,
        sampling=Sampling(
            temperature=0, top_k=7, top_p=0.5, min_p=0.25, presence_penalty=1, frequency_penalty=-1,
            repetition_penalty=1.5, logit_bias=((8, -1.5),), seed=9,
        ),
    )  # fmt: skip


def test_defaults_hold_where_a_line_says_nothing():
    reader = LineReader({"max_tokens": 4, "temperature": 0.5, "stop": ("b",)})
    request = reader.read(line('{"prompt": [1], "temperature": null}'))
    assert (request.max_tokens, request.sampling.temperature, request.stop) == (4, 0.5, ("b",))
    with pytest.raises(ConfigError, match="line 1: max_tokens is missing"):
        LineReader({}).read(line('{"prompt": [1]}'))
    with pytest.raises(ConfigError, match="no tokenizer; expected a list of token ids"):
        LineReader({"max_tokens": 1}).read(line('{"prompt": "a"}'))


def test_each_line_has_random_numbers_of_its_own():
    seeds = [
        LineReader({"max_tokens": 1}, seed=seed).read(line('{"prompt": [1]}', number)).sampling.seed
        for seed, number in ((0, 1), (0, 2), (1, 1), (0, 1))
    ]
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3] and all(s is not None and 0 <= s < 2**63 for s in seeds)


def test_messages_are_left_to_the_template():
    seen = []

    def render(chat):
        seen.append(chat)
        return [5, 6]

    text = '{"messages": [{"role": "user", "content": "a"}], "tools": [], "max_tokens": 1}'
    assert LineReader({}, render=render).read(line(text)).prompt == (5, 6)
    assert seen == [{"messages": [{"role": "user", "content": "a"}], "tools": []}]
