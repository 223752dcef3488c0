"""`/v1/completions`, without a network: forms, streams, refusals; a model without a tokenizer serves too."""

import math
import time

import pytest
from tests.infer.chats import backend, tokenizer
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import saying, with_client, worded

from orogen.infer.request import Chosen, Grammar, Sampling
from orogen.infer.serve.completions import _logprobs


def complete(engine=None, **body):
    """The response to one body. Its own settings begin with `_`."""
    settings = {key[1:]: body.pop(key) for key in list(body) if key.startswith("_")}
    return with_client(engine or FakeEngine(), lambda client: client.complete(**body), **settings)


def test_token_ids_in_and_out_without_a_tokenizer():
    reply = complete(prompt=[5, 6], max_tokens=5)
    assert reply.status == 200
    answer = reply.json
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None,
                      "token_ids": [5, 6, 5, 6, 5], "prompt_token_ids": [5, 6]}  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 5, "total_tokens": 7}


def test_several_prompts_and_several_answers_each():
    answer = complete(prompt=[[5], [6, 7]], n=2).json
    assert [(c["index"], c["token_ids"]) for c in answer["choices"]] == [
        (0, [5, 5, 5]), (1, [5, 5, 5]), (2, [6, 7, 6]), (3, [6, 7, 6]),
    ]  # fmt: skip
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_text_in_and_out():
    engine = worded(script=saying("the city é"))
    answer = complete(engine, prompt="the user", max_tokens=99, return_token_ids=True, _words=True).json
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the city é", "stop")
    assert choice["prompt_token_ids"] == tokenizer().prompt_ids("the user")
    assert choice["token_ids"] == [*backend().encode("the city é").ids, tokenizer().eos_id]
    two = complete(worded(), prompt=["the", "user"], max_tokens=1, _words=True).json
    assert len(two["choices"]) == 2 and "token_ids" not in two["choices"][0]


def test_echo_and_stop():
    engine = worded(script=saying("the city of Rome"))
    answer = complete(engine, prompt="In ", echo=True, stop=["of", "x"], max_tokens=99, _words=True).json
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("In the city ", "stop")
    assert engine.seen[0].stop == ("of", "x")
    ids = backend().encode("In ").ids
    assert (
        complete(worded(), prompt=ids, echo=True, max_tokens=1, _words=True)
        .json["choices"][0]["text"]
        .startswith("In ")
    )


def test_every_setting_reaches_the_engine():
    engine = FakeEngine()
    body = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
            "repetition_penalty": 1.5, "logit_bias": {"3": 2, "4": -1.5}, "seed": 11}  # fmt: skip
    extra = {"ignore_eos": True, "stop_token_ids": [8, 9], "priority": -2, "guided_regex": "a+", "n": 2, "logprobs": 2}
    assert complete(engine, prompt=[5], **body, **extra, _priorities=True).status == 200
    first, second = engine.seen
    expected = Sampling(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, presence_penalty=1.0, frequency_penalty=-1.0,
                        repetition_penalty=1.5, logit_bias=((3, 2.0), (4, -1.5)), seed=11)  # fmt: skip
    assert first.sampling == expected and second.sampling.seed == 12
    assert first.grammar == Grammar(kind="regex", text="a+")
    assert (first.ignore_eos, first.stop_ids, first.priority, first.logprobs) == (True, (8, 9), -2, 2)


@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": {"type": "object"}}, {"guided_json": '{"type": "object"}'},
        {"structured_outputs": {"json": {"type": "object"}}}, {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
    ],
)  # fmt: skip
def test_schemas_by_every_name(body):
    engine = FakeEngine()
    assert complete(engine, prompt=[5], **body).status == 200
    assert engine.seen[0].grammar == Grammar(kind="json_schema", text='{"type": "object"}')


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"guided_choice": ["a b", "c*"]}, Grammar(kind="regex", text=r"a\ b|c\*")),
        ({"structured_outputs": {"choice": ["é"]}}, Grammar(kind="regex", text="é")),
        ({"guided_grammar": 'root ::= "a"'}, Grammar(kind="grammar", text='root ::= "a"')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar(kind="grammar", text='start: "a"')),
        ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_schema", text='{"type": "object"}')),
        ({"structured_outputs": {"json_object": False, "json": None}, "guided_json": None}, None),
        ({"guided_json": {}}, Grammar(kind="json_schema", text="{}")),
    ],
)
def test_other_forms_of_answers(body, grammar):
    engine = FakeEngine()
    assert complete(engine, prompt=[5], **body).status == 200
    assert engine.seen[0].grammar == grammar


def test_the_best_of_several():
    """The likeliest by the mean log-probability of their tokens."""
    answers = iter([[5, 5, 5], [6, 6, 6], [5, 6, 6], [6, 5, 5]])
    engine = FakeEngine(script=lambda request: next(answers), logprob=lambda i: -0.25 if i == 6 else -2.0)
    answer = complete(engine, prompt=[5], n=2, best_of=4).json
    assert [c["token_ids"] for c in answer["choices"]] == [[6, 6, 6], [5, 6, 6]]
    assert [c["index"] for c in answer["choices"]] == [0, 1] and answer["choices"][0]["logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 12, "total_tokens": 13}
    assert [request.logprobs for request in engine.seen] == [0] * 4


def test_the_first_tokens_are_no_ends():
    engine = worded()
    ask = {"prompt": "a", "min_tokens": 2, "stop_token_ids": [9], "_words": True}
    assert complete(engine, **ask).status == complete(engine, **ask, ignore_eos=True).status == 200
    end_ids = sorted(tokenizer().end_ids)
    assert [(request.min_tokens, request.held) for request in engine.seen] == [(2, (9, *end_ids)), (2, (9,))]


def test_counts_of_each_chunk():
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(prompt=[5], stream=True, stream_options=options).events
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert last["usage"] == chunks[-1]["usage"]


def test_a_token_without_probability_is_told_in_json():
    reply = complete(FakeEngine(logprob=lambda i: -math.inf), prompt=[5], logprobs=0, max_tokens=1)
    assert reply.json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_logprobs():
    choice = complete(worded(), prompt=backend().encode("the").ids, max_tokens=2, logprobs=2, _words=True).json[
        "choices"
    ][0]
    assert choice["logprobs"] == {
        "tokens": ["the", "the"], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 3],
        "top_logprobs": [{"<unk>": -1.0, "<s>": -2.0, "the": -0.5}] * 2,
    }  # fmt: skip
    assert complete(prompt=[5], logprobs=0, max_tokens=1).json["choices"][0]["logprobs"]["tokens"] == ["token_id:5"]


def test_a_stream_adds_up_to_the_whole():
    script, ask = "the city é of Rome", {"prompt": "the user", "max_tokens": 99, "logprobs": 1, "echo": False, "n": 2}
    whole = complete(worded(script=saying(script)), **ask, return_token_ids=True, _words=True).json
    reply = complete(worded(script=saying(script)), **ask, return_token_ids=True, stream=True,
                     stream_options={"include_usage": True}, _words=True)  # fmt: skip
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = reply.events
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None and chunk["id"] == last["id"] for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"] == script
        assert [i for c in mine for i in c["token_ids"]] == choice["token_ids"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[0]["prompt_token_ids"] == choice["prompt_token_ids"] and "prompt_token_ids" not in mine[1]
        joined = {key: [v for c in mine for v in c["logprobs"][key]] for key in choice["logprobs"]}
        assert joined["tokens"] == choice["logprobs"]["tokens"]


def test_a_stream_that_echoes_begins_with_the_prompt():
    reply = complete(worded(script=saying("b")), prompt="a ", echo=True, stream=True, max_tokens=9, _words=True)
    assert "".join(c["text"] for event in reply.events for c in event["choices"]) == "a b"


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({}, "the body: prompt is missing; expected", "prompt"),
        ({"prompt": 3}, "the body: prompt is 3; expected a string or a list", "prompt"),
        ({"prompt": []}, "prompt is []; expected at least one", "prompt"),
        ({"prompt": [[]]}, "prompt is (); expected at least one token", "prompt"),
        ({"prompt": [1, "a"]}, "the body: prompt is [1, 'a']; expected", "prompt"),
        ({"prompt": [-1]}, "the body: prompt is [-1]", "prompt"),
        ({"prompt": [1.0]}, "the body: prompt is [1.0]", "prompt"),
        ({"prompt": [True]}, "the body: prompt is [True]", "prompt"),
        ({"prompt": "text"}, "prompt is a string; expected token ids, for the model has no tokenizer", "prompt"),
        ({"prompt": [1000]}, "token id 1000; expected 0 to 999", None),
        ({"prompt": [5] * 60, "max_tokens": 9}, "a prompt of 60 tokens and 9 new ones; expected at most 64", None),
        ({"prompt": [5], "max_tokens": 0}, "max_tokens is 0; expected 1 or more, or prompt_logprobs", "max_tokens"),
        ({"prompt": [5], "max_tokens": 0, "echo": True}, "max_tokens is 0; expected 1 or more, or", "max_tokens"),
        ({"prompt": [5], "max_tokens": -1}, "max_tokens is -1; expected a whole number from 0", "max_tokens"),
        ({"prompt": [5], "max_tokens": "9"}, "max_tokens is '9'", "max_tokens"),
        ({"prompt": [5], "temperature": -1}, "temperature is -1.0; expected 0 or more", "temperature"),
        ({"prompt": [5], "temperature": "hot"}, "temperature is 'hot'; expected a finite number", "temperature"),
        ({"prompt": [5], "top_p": 0}, "top_p is 0.0; expected above 0 up to 1", "top_p"),
        ({"prompt": [5], "top_k": 1.5}, "top_k is 1.5", "top_k"),
        ({"prompt": [5], "logit_bias": {"a": 1}}, "logit_bias is given for 'a'; expected the ids of tokens",
         "logit_bias"),
        ({"prompt": [5], "logit_bias": {"1": 101}}, "expected at most 300 numbers from -100 to 100", "logit_bias"),
        ({"prompt": [5], "stop": [3]}, "stop is [3]", "stop"),
        ({"prompt": [5], "stop": "x"}, "stop is 'x'; expected token ids", "stop"),
        ({"prompt": [5], "n": 129}, "n is 129", "n"),
        ({"prompt": [[5]] * 65, "n": 2}, "n is 2 for 65 prompts; expected 128 answers at most", "n"),
        ({"prompt": [5], "best_of": 2, "n": 3}, "best_of is 2; expected n, 3, or more", "best_of"),
        ({"prompt": [5], "best_of": 2, "stream": True}, "best_of is 2 beside stream; expected n, 1", "best_of"),
        ({"prompt": [[5]] * 65, "best_of": 2}, "best_of is 2 for 65 prompts; expected 128 answers", "best_of"),
        ({"prompt": [5], "prompt_logprobs": 21}, "prompt_logprobs is 21", "prompt_logprobs"),
        ({"prompt": [5], "logprobs": 21}, "logprobs is 21", "logprobs"),
        ({"prompt": [5], "suffix": "x"}, "suffix is 'x'; this server does not offer it", "suffix"),
        ({"prompt": [5], "min_tokens": 4}, "min_tokens is 4; expected 0 to max_tokens, 3", "min_tokens"),
        ({"prompt": [5], "guided_regex": "a", "guided_json": {}}, "guided_json and guided_regex; expected one", None),
        ({"prompt": [5], "structured_outputs": {"structural_tag": "a"}},
         "structured_outputs is of structural_tag; expected one of json, regex", None),
        ({"prompt": [5], "guided_choice": []}, "guided_choice is []; expected at least one text", "guided_choice"),
        ({"prompt": [5], "stream_options": {"include_usage": True}}, "stream_options is given without stream", None),
        ({"prompt": [5], "response_format": {"type": "xml"}}, "response_format.type is 'xml'", "response_format.type"),
        ({"prompt": [5], "response_format": {"type": "json_schema"}}, "json_schema is missing", None),
        ({"prompt": [5], "stream_options": []}, "stream_options is []", "stream_options"),
    ],
)  # fmt: skip
def test_bad_bodies_are_told_in_one_line(body, message, param):
    reply = complete(**body)
    assert reply.status == 400, reply
    error = reply.json["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].startswith(param)


def test_unknown_fields_are_named_and_ignored():
    reply = complete(prompt=[5], temprature=3, user="me", é=1, suffix=None)
    assert reply.status == 200
    assert reply.headers["x-ignored-fields"] == '"temprature", "\\u00e9"'
    assert "x-ignored-fields" not in complete(prompt=[5]).headers
    reply = complete(prompt=[5], max_completion_tokens=[])
    assert (reply.status, reply.headers["x-ignored-fields"]) == (200, '"max_completion_tokens"')


def test_another_model_is_not_found():
    reply = complete(prompt=[5], model="other")
    assert reply.status == 404 and reply.json["error"]["code"] == "model_not_found"
    assert reply.error == "the model 'other' does not exist; expected 'tiny'"
    assert complete(prompt=[5], model="tiny").status == 200
    assert len(complete(prompt=[5], model="x" * 10**4).error) < 3000


def test_a_request_that_fails():
    reply = complete(FakeEngine(fails=5), prompt=[5])
    assert reply.status == 500 and reply.error == "the logits of this request are not finite"
    assert reply.json["error"]["type"] == "server_error"
    *_, event = complete(FakeEngine(fails=5), prompt=[5], stream=True).events
    assert event["error"]["message"] == "the logits of this request are not finite"


def test_time_is_up():
    slow = {"prompt": [5], "max_tokens": 50, "_timeout": 0.15}
    reply = complete(FakeEngine(wait=0.02), **slow)
    assert reply.status == 504 and reply.error == "the request took more than 0.15 s"
    *begun, late = complete(FakeEngine(wait=0.02), **slow, stream=True).events
    assert begun and late["error"]["message"] == "the request took more than 0.15 s"


def test_log_probabilities_of_a_long_answer_take_linear_time():
    count, began = 20_000, time.perf_counter()
    found = _logprobs([Chosen(5, -0.5)] * count, None, 3)
    assert time.perf_counter() - began < 2  # in quadratic time, ten or more
    size = len(found["tokens"][0])
    assert found["text_offset"] == [3 + size * i for i in range(count)]
    assert _logprobs([], None, 3)["text_offset"] == []


def test_more_stop_ids_than_can_be_held_back_are_named():
    stops = list(range(3, 34))  # and the tokenizer's two
    fields = {"prompt": [5], "min_tokens": 1, "max_tokens": 2, "_words": True}
    assert complete(worded(), **fields, stop_token_ids=stops[:-1]).status == 200
    reply = complete(worded(), **fields, stop_token_ids=stops)
    assert reply.status == 400 and reply.json["error"]["param"] == "stop_token_ids"
    assert reply.error.startswith("stop_token_ids is (3, 4")
    assert reply.error.endswith("expected at most 30 beside min_tokens")
