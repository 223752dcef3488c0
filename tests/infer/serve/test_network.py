"""The server on a socket: many streams at once, clients that vanish, SIGTERM under load, the `openai` client."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.helpers import child_process
from tests.infer.chats import WEATHER
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import saying, worded
from tests.infer.serve.live import ids_in, post, serving, stream

STREAMS = 200


def test_two_hundred_streams_at_once_get_their_own_tokens_and_fair_turns():
    engine = FakeEngine(slots=STREAMS, queue=STREAMS, most=1000, vocab=10_000, wait=0.02)

    async def use(port):
        prompts = [[1000 + n, 2000 + n, 3000 + n] for n in range(STREAMS)]
        return await asyncio.gather(*(stream(port, {"prompt": p, "max_tokens": 15}) for p in prompts))

    with serving(engine) as (port, service):
        found = asyncio.run(use(port))
        assert service.open == 0
    for n, events in enumerate(found):
        assert ids_in(events) == [1000 + n, 2000 + n, 3000 + n] * 5
    ends, begins = sorted(e[-1][0] for e in found), sorted(e[0][0] for e in found)
    spans = sorted(e[-1][0] - e[0][0] for e in found)
    # Whoever came first does not end long before the rest began, and no stream is held up.
    assert ends[0] > begins[STREAMS // 2]
    assert spans[-1] < 4 * spans[STREAMS // 2] + 1, spans


@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_too_much_hears_so(chunked):
    """Not only that the connection was closed."""
    body = b'{"prompt": "' + b"a" * 2**23 + b'"}'
    with serving(FakeEngine(), most_body=1000) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/v1/completions", iter([body]) if chunked else body, encode_chunked=chunked,
                           headers={"transfer-encoding": "chunked"} if chunked else {})  # fmt: skip
        response = connection.getresponse()
        assert response.status == 413 and "expected at most" in json.load(response)["error"]["message"]


def test_vanished_clients_free_their_slots():
    engine = FakeEngine(slots=4, queue=100, most=10_000, wait=0.001)

    async def use(port):
        await asyncio.gather(*(stream(port, {"prompt": [n + 3], "max_tokens": 9000}, leave_after=2) for n in range(40)))
        assert ids_in(await stream(port, {"prompt": [5], "max_tokens": 3})) == [5, 5, 5]

    with serving(engine) as (port, service):
        asyncio.run(asyncio.wait_for(use(port), 60))
        deadline = time.monotonic() + 10
        while (service.open or engine.busy) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.open == 0 and not engine.busy
    assert len(engine.cancelled) == 40


@pytest.mark.parametrize(("tokens", "drain_seconds", "whole"), [(40, "20", True), (9000, "0.3", False)])
def test_sigterm_under_load(tokens, drain_seconds, whole):
    """What runs may end within the time for it; what comes is refused; the status is 0."""
    command = [sys.executable, "-m", "tests.infer.serve.live", "0.03", drain_seconds]
    with child_process(command, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        running = [post(port, "/v1/completions", {"prompt": [n], "max_tokens": tokens, "stream": True}) for n in (5, 6)]
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        refused = post(port, "/v1/completions", {"prompt": [7]})
        assert (refused.status, json.load(refused)["error"]["type"]) == (503, "server_error")
        for n, response in zip((5, 6), running, strict=True):
            *events, end = [line[6:] for line in response.read().decode().split("\n\n") if line]
            assert end == "[DONE]"
            last = json.loads(events[-1])
            if whole:
                assert [i for e in events for i in json.loads(e)["choices"][0]["token_ids"]] == [n] * tokens
            else:
                assert last["error"]["message"] == "the server shut down"
        assert process.wait(20) == 0, process.stderr and process.stderr.read()


def test_the_signal_of_ctrl_c_and_a_second_one():
    command = [sys.executable, "-m", "tests.infer.serve.live", "0.03", "60"]
    with child_process(command, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        response = post(port, "/v1/completions", {"prompt": [5], "max_tokens": 9000, "stream": True})
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        response.close()


@pytest.mark.peer
def test_the_openai_client():
    import openai

    call = "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
    engine = worded(script=saying("hm\n</think>\nthe city", f"</think>{call}", "</think>the user", "the weather", "x"))
    with serving(engine, words=True, key="secret") as (port, _):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        says = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model="tiny", messages=says, logprobs=True, top_logprobs=1)
        said = answer.choices[0]
        assert said.message.content == "the city" and said.message.reasoning_content == "hm"
        assert len(said.logprobs.content) == answer.usage.completion_tokens
        called = client.chat.completions.create(model="tiny", messages=says, tools=[WEATHER]).choices[0]
        assert called.finish_reason == "tool_calls"
        assert json.loads(called.message.tool_calls[0].function.arguments) == {"city": "Rome"}
        chunks = list(client.chat.completions.create(
            model="tiny", messages=says, stream=True, stream_options={"include_usage": True}))  # fmt: skip
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "the user"
        assert chunks[-1].usage.completion_tokens > 2
        whole = client.completions.create(
            model="tiny", prompt="a", max_tokens=20, extra_body={"return_token_ids": True}
        )
        assert whole.choices[0].text == "the weather" and whole.choices[0].token_ids
        parts = client.completions.create(model="tiny", prompt=[5, 6], max_tokens=4, stream=True)
        assert "".join(part.choices[0].text for part in parts) == "x"
        with client.responses.stream(model="tiny", input="hi", reasoning={"effort": "none"}) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "x"
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        kept = {"model": "tiny", "input": "hi", "instructions": "Be kind.", "store": False}
        assert client.responses.create(**kept, reasoning={"effort": "none"}).output_text == "x"
        with pytest.raises(openai.BadRequestError, match="previous_response_id is 'resp_1'; this server keeps nothing"):
            client.responses.create(**kept, previous_response_id="resp_1")
        with pytest.raises(openai.BadRequestError, match="temperature is -1.0; expected 0 or more"):
            client.completions.create(model="tiny", prompt="a", temperature=-1)
        with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
    broken = FakeEngine(fails=5)
    with serving(broken) as (port, _):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.completions.create(model="tiny", prompt=[5])
        with pytest.raises(openai.APIError, match="not finite"):
            list(client.completions.create(model="tiny", prompt=[5], stream=True))
    assert os.environ.get("OPENAI_API_KEY") is None
