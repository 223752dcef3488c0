"""`/v1/responses`, without a network: items, named events, what a server that keeps nothing refuses."""

import json

import pytest
from tests.infer.chats import WEATHER, backend
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import saying, with_client, worded

from orogen.infer.request import Budget, Grammar
from orogen.infer.serve.conversation import chat_of

TOOL = {"type": "function", **WEATHER["function"]}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"


def respond(*answers: str, engine=None, events=False, **body):
    """The response, or the events of a stream, of an engine that says these texts. Its own settings begin with `_`."""
    settings = {key[1:]: body.pop(key) for key in list(body) if key.startswith("_")}
    engine = engine or worded(script=saying(*(answers or ("</think>yes",))))
    asked = {"input": "hi", **body, **({"stream": True} if events else {})}
    reply = with_client(engine, lambda c: c.post("/v1/responses", asked), **{"words": True, **settings})
    return named(reply) if events else reply


def named(reply) -> list[dict]:
    """The objects of a stream, each of which has a line with its name."""
    *parts, end = reply.text.split("\n\n")
    assert end == "" and reply.status == 200, reply
    events = [part.split("\ndata: ") for part in parts]
    found = [json.loads(data) for _, data in events]
    assert [name for name, _ in events] == [f"event: {event['type']}" for event in found]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt_of(engine) -> str:
    return backend().decode(list(engine.seen[-1].prompt), skip_special_tokens=False)


def test_reasoning_and_a_message():
    engine = worded(script=saying("hm é</think>\nyes"), cached=7)
    answer = respond(engine=engine, instructions="Be kind.", max_output_tokens=99, metadata={"a": "b"}).json
    assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "tiny")
    assert answer["id"].startswith("resp_") and answer["metadata"] == {"a": "b"} and answer["store"] is False
    reasoning, message = answer["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm é"}]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}]
    ids = backend().encode("hm é</think>\nyes").ids
    assert answer["usage"] == {
        "input_tokens": len(engine.seen[0].prompt), "input_tokens_details": {"cached_tokens": 7},
        "output_tokens": len(ids) + 1, "total_tokens": len(engine.seen[0].prompt) + len(ids) + 1,
        "output_tokens_details": {"reasoning_tokens": len(backend().encode("hm é</think>").ids)},
    }  # fmt: skip
    assert "system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>" in prompt_of(engine)


def test_an_answer_that_was_cut():
    answer = respond("</think>the user the user", max_output_tokens=4).json
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"
    *_, last = respond("</think>the user the user", max_output_tokens=4, events=True)
    assert last["type"] == "response.incomplete" and last["response"]["status"] == "incomplete"


def test_calls_go_out_and_back():
    answer = respond(f"hm</think>{CALL}", tools=[TOOL]).json
    reasoning, call = answer["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", {"city": "Rome"})
    assert call["call_id"].startswith("call_") and call["status"] == "completed"
    engine = worded(script=saying("</think>sun"))
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    said = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Where?"}]}
    respond(engine=engine, input=[said, reasoning, call, result], tools=[TOOL])
    assert prompt_of(engine).endswith(
        f"user\nWhere?<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n{CALL}\n<|im_end|>\n<|im_start|>user\n"
        "<tool_response>\nsun\n</tool_response>\n<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_earlier_answers_are_messages_of_their_own():
    engine = worded(script=saying("</think>c"))
    said = [{"type": "output_text", "text": "a"}]
    items = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said},
             {"role": "assistant", "content": "b"}, {"role": "user", "content": "y"}]  # fmt: skip
    respond(engine=engine, input=items)
    assert prompt_of(engine).count("<|im_start|>assistant") == 3
    thought = {"type": "reasoning", "content": "R"}
    assert chat_of({"input": [thought, items[1]]})["messages"] == [
        {"role": "assistant", "reasoning_content": "R", "content": "a"}
    ]


@pytest.mark.parametrize("text", ["hm é\n</think>\nyes 🙂", f"hm</think>Look.\n{CALL}\n{CALL}", "a </thin", "</think>"])
def test_events_add_up_to_the_whole(text):
    whole = respond(text, tools=[TOOL], top_logprobs=1).json
    events = respond(text, tools=[TOOL], top_logprobs=1, events=True)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]
    assert last["type"] == "response.completed" and events[0]["response"]["id"] == last["response"]["id"]

    def without_ids(items):
        return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]

    assert without_ids(last["response"]["output"]) == without_ids(whole["output"])
    assert last["response"]["usage"] == whole["usage"]
    for index, item in enumerate(last["response"]["output"]):
        mine = [event for event in events if event.get("output_index") == index]
        assert (mine[0]["type"], mine[-1]["type"]) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1]["item"] == item and mine[0]["item"]["id"] == item["id"]
        deltas = [event for event in mine if event["type"].endswith(".delta")]
        joined, done = "".join(event["delta"] for event in deltas), mine[-2 if "arguments" in item else -3]
        assert joined == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
        assert done["type"].endswith(".done") and joined in done.values()
        if item["type"] == "message":
            told = [one for event in deltas for one in event["logprobs"]]
            assert told == item["content"][0]["logprobs"]
            spelled = bytes(byte for one in told for byte in one["bytes"]).decode()
            assert spelled.startswith(joined) or spelled.strip().startswith(joined)


def test_one_call_only():
    assert len(respond(f"</think>{CALL}{CALL}", tools=[TOOL], parallel_tool_calls=False).json["output"]) == 1


def test_settings_reach_the_engine():
    engine = worded(script=saying("{}"))
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    respond(engine=engine, text={"format": schema}, temperature=0.5, seed=3, max_output_tokens=7, min_tokens=2)
    asked = engine.seen[0]
    assert asked.grammar == Grammar(kind="json_schema", text='{"type": "object"}')
    assert (asked.sampling.temperature, asked.sampling.seed, asked.max_tokens, asked.min_tokens) == (0.5, 3, 7, 2)
    respond(engine=engine, reasoning={"effort": "none", "summary": "auto"})
    assert prompt_of(engine).endswith("<think></think>")
    respond(engine=engine, reasoning_budget=7)
    assert engine.seen[-1].budget == Budget(tokens=7)
    for choice in (
        {"type": "function", "name": "weather"},
        "required",
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    ):
        respond(engine=engine, tools=[TOOL], tool_choice=choice)  # fmt: skip
        assert prompt_of(engine).endswith("<tool_call>\n<function=weather>\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"store": True}, "store is True; this server keeps nothing between requests"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is 'resp_1'; this server keeps nothing"),
        ({"conversation": "a"}, "conversation is 'a'; this server keeps nothing"),
        ({"background": True}, "background is True; this server keeps nothing"),
        ({"truncation": "auto"}, "truncation is 'auto'; expected disabled"),
        ({"input": []}, "input is []; expected at least one item"),
        ({"input": 3}, "the body: input is 3; expected a string or a list"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type is 'item_reference'; expected message,"),
        ({"input": [{"content": "a"}]}, "input[0].role is missing; expected a text"),
        ({"input": [{"role": "user"}]}, "input[0].content is missing; expected a text"),
        ({"input": [{"role": "king", "content": "a"}]}, "messages[0].role is 'king'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].type is 'input_image'; expected input_text or output_text"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "input[0].call_id is missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type is 'web_search'; expected function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name is None; expected a text"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "expected a function among tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "schema is missing; expected a JSON schema"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0; expected a whole number from 1"),
        ({"max_output_tokens": 4000}, "new ones; expected at most 4000"),
    ],
)  # fmt: skip
def test_bad_bodies_are_told_in_one_line(body, message):
    reply = respond(**body)
    assert reply.status == 400 and message in reply.error and "\n" not in reply.error, reply


def test_a_request_that_fails_and_one_that_takes_too_long():
    failing = worded(fails=backend().token_to_id("<|im_start|>"))
    assert respond(engine=failing).status == 500
    *_, last = respond(engine=failing, events=True)
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"] == "the logits of this request are not finite"
    slow = with_client(
        worded(wait=0.02, script=saying("the user" * 50)),
        lambda c: c.post("/v1/responses", {"input": "a", "stream": True}), words=True, timeout=0.15,
    )  # fmt: skip
    *_, last = named(slow)
    assert (last["type"], last["code"]) == ("error", "timeout_error")
    assert "more than 0.15 s" in last["message"]


def test_a_model_without_a_template():
    assert "no chat template" in respond(engine=FakeEngine(), _words=False).error


def test_thoughts_in_a_row_are_one_and_later_ones_go_with_what_they_led_to():
    first, second = ({"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]} for text in "ab")
    said, call = {"role": "assistant", "content": "c"}, {"type": "function_call", "name": "f", "arguments": "{}"}
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = lambda *items: chat_of({"input": list(items)})["messages"]  # noqa: E731
    assert messages(first, second, said) == [{"role": "assistant", "reasoning_content": "a\nb", "content": "c"}]
    assert messages(first, said, second, {**call, "call_id": "1"}) == [
        {"role": "assistant", "reasoning_content": "a", "content": "c"},
        {"role": "assistant", "reasoning_content": "b", "tool_calls": calls},
    ]
