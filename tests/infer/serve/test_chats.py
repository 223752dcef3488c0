"""`/v1/chat/completions`, without a network: reasoning, tools, streams, refusals."""

import json

import pytest
from tests.infer.chats import WEATHER, backend, tokenizer
from tests.infer.serve.harness import saying, with_client, worded

from orogen.infer.request import Budget, Grammar

STOP_TOOL = {"type": "function", "function": {"name": "stop"}}
NAMED_BADLY = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a<b": {}}}}}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome é\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
ARGUMENTS = {"city": "Rome é", "days": 3}
DEEP = '{"a": ' + "[" * 600 + "]" * 600 + "}"


def chat(*answers: str, engine=None, **body):
    """The response to one body by an engine that says these texts. Its own settings begin with `_`."""
    settings = {key[1:]: body.pop(key) for key in list(body) if key.startswith("_")}
    engine = engine or worded(script=saying(*(answers or ("yes",))))
    return with_client(engine, lambda client: client.chat(**body), **{"words": True, **settings})


def prompt_of(engine) -> str:
    """What the engine was asked last, specials by name."""
    return backend().decode(list(engine.seen[-1].prompt), skip_special_tokens=False)


def message(reply) -> dict:
    assert reply.status == 200, reply
    return reply.json["choices"][0]["message"]


def joined(events: list, number: int = 0) -> dict:
    """A choice of a stream, put together as a client does it."""
    whole: dict = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": [], "role": None}
    for choice in (c for event in events for c in event["choices"] if c["index"] == number):
        delta = choice["delta"]
        whole["role"] = delta.get("role", whole["role"])
        for key in ("content", "reasoning_content"):
            whole[key] += delta.get(key) or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(whole["tool_calls"]):
                whole["tool_calls"].append({**call, "function": dict(call["function"])})
            else:
                whole["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        whole["finish_reason"] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return whole


def test_reasoning_and_content():
    engine = worded(script=saying("hm é\n</think>\nyes"))
    reply = chat(engine=engine, text="the user?")
    assert message(reply) == {"role": "assistant", "content": "yes", "reasoning_content": "hm é", "refusal": None}
    assert reply.json["object"] == "chat.completion" and reply.json["choices"][0]["finish_reason"] == "stop"
    assert prompt_of(engine).endswith("<|im_start|>user\nthe user?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert engine.seen[-1].max_tokens == 4000 - len(engine.seen[-1].prompt), "as far as the model goes"
    counted = len(engine.seen[-1].prompt), len(backend().encode("hm é\n</think>\nyes").ids) + 1
    *told, details = reply.json["usage"].values()
    assert told == [*counted, sum(counted)]
    assert details == {"reasoning_tokens": len(backend().encode("hm é\n</think>").ids)}


def test_thinking_that_does_not_end_is_reasoning():
    assert message(chat("hm <b"))["reasoning_content"] == "hm <b"
    reply = chat("hm <b")
    assert message(reply)["content"] == ""
    usage = reply.json["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"]


def test_thinking_is_turned_off_and_budgeted():
    engine = worded()
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert message(chat("yes", engine=(engine := worded(script=saying("yes"))), **body))["content"] == "yes"
        assert prompt_of(engine).endswith("<think></think>")
    for body in ({"reasoning_budget": 7}, {"chat_template_kwargs": {"reasoning_budget": 7}}):
        chat(engine=engine, **body, max_tokens=3)
        assert engine.seen[-1].budget == Budget(tokens=7)
        assert "hi\n\n{thinking token budget: 7}<|im_end|>" in prompt_of(engine)
    chat(engine=engine, reasoning_budget=7, reasoning_budget_form="grace", max_completion_tokens=3)
    assert engine.seen[-1].budget == Budget(tokens=7, form="grace") and engine.seen[-1].max_tokens == 3
    chat(engine=engine, reasoning_budget=7, chat_template_kwargs={"enable_thinking": False}, max_tokens=3)
    assert engine.seen[-1].budget is None, "nothing is thought"


def test_a_call():
    reply = chat(f"hm\n</think>\nLet me look.\n{CALL}", tools=[WEATHER, STOP_TOOL])
    found = message(reply)
    (call,) = found.pop("tool_calls")
    assert found == {"role": "assistant", "content": "Let me look.", "reasoning_content": "hm", "refusal": None}
    assert call["type"] == "function" and call["id"].startswith("call_") and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert reply.json["choices"][0]["finish_reason"] == "tool_calls"


def test_several_calls_and_one_only():
    text = f"</think>{CALL}\n<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    found = message(chat(text, tools=[WEATHER, STOP_TOOL]))
    assert [c["function"]["name"] for c in found["tool_calls"]] == ["weather", "stop"] and found["content"] is None
    assert found["tool_calls"][1]["function"]["arguments"] == "{}"
    assert len({c["id"] for c in found["tool_calls"]}) == 2
    assert len(message(chat(text, tools=[WEATHER, STOP_TOOL], parallel_tool_calls=False))["tool_calls"]) == 1


def test_a_broken_call_is_text():
    reply = chat("</think>a <tool_call>\n<function=none>\n</function>\n</tool_call>", tools=[WEATHER])
    assert message(reply)["content"] == "a <tool_call>\n<function=none>\n</function>\n</tool_call>"
    assert reply.json["choices"][0]["finish_reason"] == "stop"


def test_no_tools_where_none_may_be_called():
    engine = worded(script=saying(f"</think>{CALL}"))
    assert message(chat(engine=engine, tools=[WEATHER], tool_choice="none"))["content"] == CALL
    assert "weather" not in prompt_of(engine)


@pytest.mark.parametrize(
    ("template", "begin", "rest"),
    [
        ("nemotron_3_nano", "<think></think><tool_call>\n<function=weather>\n", CALL.partition("weather>\n")[2]),
        ("nemotron_nano_2", '<think></think><TOOLCALL>[{"name": "weather", "arguments": ',
         f"{json.dumps(ARGUMENTS)}}}]</TOOLCALL>"),
    ],
)  # fmt: skip
def test_a_call_that_must_be_made_is_begun_in_the_prompt(template, begin, rest):
    for body in (
        {"tools": [WEATHER, STOP_TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tools": [WEATHER], "tool_choice": "required"},
    ):
        engine = worded(script=saying(rest))
        found = message(chat(engine=engine, _template=template, **body))
        assert prompt_of(engine).endswith(begin) and engine.seen[-1].grammar.kind == "grammar"
        assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in found["tool_calls"]] == [
            ("weather", ARGUMENTS)
        ]
        assert found["content"] is None


def test_of_several_tools_the_grammar_knows_the_names():
    engine = worded(script=saying(CALL.partition("<function=")[2]))
    found = message(chat(engine=engine, tools=[WEATHER, STOP_TOOL], tool_choice="required"))
    assert prompt_of(engine).endswith("<think></think><tool_call>\n<function=")
    assert all(f'"{name}>\\n"' in engine.seen[-1].grammar.text for name in ("weather", "stop"))
    assert found["tool_calls"][0]["function"]["name"] == "weather"


def test_an_answer_of_a_given_form_is_not_thought_about():
    engine = worded(script=saying("{}"))
    assert message(chat(engine=engine, response_format={"type": "json_object"}))["content"] == "{}"
    assert engine.seen[-1].grammar == Grammar(kind="json_schema", text='{"type": "object"}')
    assert prompt_of(engine).endswith("<think></think>")


@pytest.mark.parametrize("more", [{"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_budget": 9}])
def test_an_answer_of_a_given_form_after_a_thought(more):
    engine = worded(script=saying("hm</think>{}"))
    found = message(chat(engine=engine, response_format={"type": "json_object"}, **more))
    assert (found["reasoning_content"], found["content"]) == ("hm", "{}")
    assert prompt_of(engine).endswith("<think>\n") and engine.seen[-1].grammar is not None


@pytest.mark.parametrize(("mode", "begun"), [("auto", "<think>\n"), ("required", "<tool_call>\n<function=stop>\n")])
def test_some_tools_are_allowed(mode, begun):
    engine = worded(script=saying(f"</think>{CALL}"))
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "stop"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    assert "tool_calls" not in message(chat(engine=engine, tools=[WEATHER, STOP_TOOL], tool_choice=choice))
    assert prompt_of(engine).endswith(begun) and "weather" not in prompt_of(engine)


def test_a_stop_string_is_told_and_shown_if_asked_for():
    for more, text in (({}, "the "), ({"include_stop_str_in_output": True}, "the city")):
        ask = {"stop": ["user", "city"], "chat_template_kwargs": {"enable_thinking": False}, **more}
        reply = chat("the city of", **ask)
        assert message(reply)["content"] == text and reply.json["choices"][0]["stop_reason"] == "city"
        chunks = [c for event in chat("the city of", **ask, stream=True).events for c in event["choices"]]
        assert "".join(c["delta"].get("content", "") for c in chunks) == text
        assert chunks[-1]["stop_reason"] == "city"


def test_tool_results_and_calls_go_back_to_the_model():
    engine = worded(script=saying("yes"))
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    chat(engine=engine, messages=messages)
    assert prompt_of(engine) == (
        "<|im_start|>system\nBe\nkind.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nR\n</think>\n{CALL}\n<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


@pytest.mark.parametrize(
    "text",
    ["hm é\nand\n</think>\nyes 🙂", f"hm</think>Look.\n{CALL}\n{CALL}", "a </thin", "</think>", f"</think>{CALL} b"],
)
def test_a_stream_adds_up_to_the_whole(text):
    ask = {"tools": [WEATHER], "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = chat(text, **ask).json
    reply = chat(text, **ask, stream=True, stream_options={"include_usage": True})
    *chunks, last = reply.events
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for number, choice in enumerate(whole["choices"]):
        found, wanted = joined(chunks, number), choice["message"]
        assert found["role"] == "assistant" and found["finish_reason"] == [choice["finish_reason"]]
        assert found["content"] == (wanted["content"] or "")
        assert found["reasoning_content"] == (wanted["reasoning_content"] or "")
        named = [[c["function"] for c in calls] for calls in (found["tool_calls"], wanted.get("tool_calls", []))]
        assert named[0] == named[1]
        mine = [c for event in chunks for c in event["choices"] if c["index"] == number]
        assert [i for c in mine for i in c.get("token_ids", [])] == choice["token_ids"]
        logprobs = [one for c in mine if c["logprobs"] for one in c["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert len(logprobs) == len(choice["token_ids"])
        assert bytes(b for one in logprobs for b in one["bytes"]).decode() == tokenizer().decode(choice["token_ids"])


def test_text_streams_as_it_comes():
    reply = chat("the user the user</think>the city", stream=True)
    deltas = [c["delta"] for event in reply.events for c in event["choices"]]
    assert sum("reasoning_content" in d for d in deltas) > 3 and sum(bool(d.get("content")) for d in deltas) > 1
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": 3}, "messages is 3; expected a list"),
        ({"messages": []}, "messages is []; expected at least one"),
        ({"messages": [{}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "king", "content": "a"}]},
         "messages[0].role is 'king'; expected one of system, developer"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing; expected a string"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is 3; expected a string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "[0].content[0].type is 'image_url'; expected text"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}]},
         "messages[0].tool_calls[0].function.arguments is '['; expected a JSON object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": DEEP}}]}]},
         "expected a JSON object (it nests more than 64 deep"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "has a lone surrogate; expected valid Unicode"),
        ({"tools": [{"type": "web"}]}, "tools[0].function is missing"),
        ({"tools": [{"type": "web", "function": {"name": "a"}}]}, "tools[0].type is 'web'; expected function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
         "tools[0].function.name is 'a b'; expected letters"),
        ({"tool_choice": "required"}, "tool_choice is 'required' without tools; expected tools"),
        ({"tool_choice": "some"}, "tool_choice is 'some'; expected auto, none, required or a function"),
        ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, "expected a function among tools"),
        ({"tools": [STOP_TOOL], "tool_choice": "required", "guided_regex": "a"},
         "tool_choice asks for a call beside an answer"),
        ({"tools": [STOP_TOOL], "tool_choice": "required", "chat_template_kwargs": {"enable_thinking": True}},
         "enable_thinking is True beside a call that must be made; expected false"),
        ({"tools": [STOP_TOOL], "tool_choice": {"type": "allowed_tools"}}, "expected the mode auto or required"),
        ({"tools": [STOP_TOOL], "tool_choice": {"type": "function"}}, "expected a function among tools"),
        ({"tools": [NAMED_BADLY], "tool_choice": "required"}, "properties has 'a<b'; expected a name without"),
        ({"stream_options": {"include_usage": True}}, "stream_options is given without stream; expected stream true"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "enable_thinking is 'no'; expected true or false"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages; expected it as a field"),
        ({"chat_template_kwargs": {"reasoning_budget": -1}},
         "reasoning_budget is -1; expected a whole number, 0 or more"),
        ({"reasoning_budget": 5, "reasoning_budget_form": "soft"},
         "reasoning_budget_form is 'soft'; expected one of hard, grace"),
        ({"reasoning_budget_form": "hard"}, "reasoning_budget_form is 'hard'; expected it beside a budget"),
        ({"reasoning_effort": "loads"}, "reasoning_effort is 'loads'; expected one of none, minimal, low, medium"),
        ({"top_logprobs": 3}, "top_logprobs is 3 without logprobs; expected logprobs true"),
        ({"logprobs": 3}, "logprobs is 3; expected true or false"),
        ({"functions": []}, "functions is []; this server does not offer it"),
        ({"max_tokens": 4000}, "new ones; expected at most 4000"),
    ],
)  # fmt: skip
def test_bad_bodies_are_told_in_one_line(body, message):
    reply = chat(**body)
    assert reply.status == 400, reply
    assert message in reply.error and "\n" not in reply.error


def test_a_model_without_a_template_does_not_chat():
    assert "no chat template; expected /v1/completions" in chat(_template=None).error
    assert chat(_words=False).status == 400
