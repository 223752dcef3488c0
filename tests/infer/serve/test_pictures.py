"""Chats with images, answered by a function in place of a captioner."""

import base64

import pytest
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import with_client

from orogen.config.checks import ConfigError
from orogen.infer.sight import Seen


def url(data=b"\x89PNG", kind="png"):
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def message(*parts):
    return {"role": "user", "content": list(parts)}


class Recorder:
    """Notes what it is asked, and answers the same each time."""

    def __init__(self, ended=True):
        self.asked, self.ended = [], ended

    def __call__(self, said, most):
        self.asked.append((list(said), most))
        if b"broken" in said:
            raise ConfigError("image 0: it is broken; expected an image")
        return Seen("a red\nsquare", 7, 3, self.ended, [{"image": 0, "caption": "red", "score": 0.5}])


def post(sees, *messages, words=False, **body):
    """The reply to a chat. Its engine must not be asked."""

    async def use(client):
        return await client.post("/v1/chat/completions", {"messages": list(messages), **body})

    engine = FakeEngine(decode=lambda *_: pytest.fail("the engine was asked"))
    return with_client(engine, use, sees=sees, words=words)


def test_texts_and_images_arrive_in_order_and_the_answer_in_the_form_of_chats():
    sees = Recorder()
    system = {"role": "system", "content": "be short"}
    reply = post(sees, system, message(url(b"one"), {"type": "text", "text": "and"}, url(b"two", "jpeg")), max_tokens=9)
    assert sees.asked == [(["be short", b"one", "and", b"two"], 9)]
    (choice,), usage = reply.json["choices"], reply.json["usage"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a red\nsquare", "stop")
    assert choice["message"]["retrieved"] == [{"image": 0, "caption": "red", "score": 0.5}]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 3, 10)


def test_a_stream_says_the_same_and_what_was_cut_short_ends_by_length():
    sees = Recorder(ended=False)
    events = post(sees, message(url()), stream=True, stream_options={"include_usage": True}).events
    assert sees.asked[0][1] == 64
    deltas = [choice["delta"].get("content") for event in events for choice in event["choices"]]
    assert deltas == ["a red\nsquare", None]
    assert events[1]["choices"][0]["finish_reason"] == "length"
    assert events[2]["usage"]["total_tokens"] == 10


@pytest.mark.parametrize(
    ("parts", "body", "reason"),
    [
        (["http://a/b.png"], {}, "content[0].image_url.url is 'http://a/b.png'; expected data:image/"),
        (["file:///etc/passwd"], {}, "since nothing is fetched"),
        (["data:text/html;base64,AAAA"], {}, "expected data:image/"),
        (["data:image/png;base64,A"], {}, "content[0].image_url.url is no base64"),
        ([url(b"broken")], {}, "image 0: it is broken; expected an image"),
        ([url()] * 9, {}, "messages have 9 images; expected at most 8"),
        ([url(), {"type": "video"}], {}, "content[1].type is 'video'; expected text or image_url"),
        ([url(), {"type": "image_url"}], {}, "content[1].type is 'image_url'; expected text or image_url"),
        ([url()], {"temperature": 0.7}, "temperature is 0.7; expected nothing of it beside images"),
        ([url()], {"n": 2}, "n is 2; expected nothing"),
        ([url()], {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is "),
        ([url()], {"max_tokens": 0}, "max_tokens is 0; expected"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(parts, body, reason):
    parts = [{"type": "image_url", "image_url": {"url": one}} if isinstance(one, str) else one for one in parts]
    reply = post(Recorder(), message(*parts), **body)
    assert reply.status == 400
    assert reason in reply.error
    assert "\n" not in reply.error


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
         "messages[0].tool_calls is [{'function'"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "messages[0].reasoning_content is 'b'"),
        ({"role": "assistant", "content": "a", "reasoning": "b"}, "messages[0].reasoning is 'b'; expected nothing of"),
        ({"role": "assistant"}, "messages[0].content is missing; expected a text"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_of_a_message_is_refused(before, reason):
    sees = Recorder()
    reply = post(sees, before, message(url()))
    assert (reply.status, sees.asked) == (400, []) and reason in reply.error


def test_answers_to_images_are_counted():
    async def use(client):
        for stream in (False, True):
            await client.post("/v1/chat/completions", {"messages": [message(url())], "stream": stream})
        return await client.get("/metrics")

    text = with_client(FakeEngine(), use, sees=Recorder()).text
    for line in (
        "prompt_tokens_total 14.0",
        "generation_tokens_total 6.0",
        'requests_finished_total{reason="stop"} 2.0',
    ):
        assert f"orogen_{line}\n" in text


def test_a_body_with_a_large_image_is_refused_by_its_size():
    reply = post(Recorder(), message(url(b"0" * 3000)), **{})
    assert reply.status == 200
    engine = FakeEngine()

    async def use(client):
        return await client.post("/v1/chat/completions", {"messages": [message(url(b"0" * 3000))]})

    assert with_client(engine, use, sees=Recorder(), most_body=2000).status == 413


def test_a_model_that_sees_nothing_says_so():
    reply = post(None, message(url()), words=True)
    assert (reply.status, reply.error) == (400, "messages[0].content[0].type is 'image_url'; expected text")
