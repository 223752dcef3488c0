"""What is done for requests before the engine has them: its bounds, its end, and who waits for whom."""

import asyncio
import threading

import pytest
from tests.infer.fake_engine import FakeEngine
from tests.infer.serve.harness import BODIES, with_client, worded


def test_prompts_that_wait_when_the_server_ends_are_not_rendered():
    go, rendered = threading.Event(), []

    async def use(client):
        run = client.app.state.parts.preparing.run_chat
        tasks = [asyncio.create_task(run(work, 10)) for work in (go.wait, rendered.append)]
        await asyncio.sleep(0.01)
        return tasks

    try:
        for task in with_client(FakeEngine(), use):
            assert (task.exception().status, str(task.exception())) == (503, "the server is shutting down")
    finally:
        go.set()
    assert not rendered


@pytest.mark.parametrize("path", [*BODIES, "/tokenize"])
def test_work_before_the_engine_is_bounded(path, monkeypatch):
    """Three bodies whose prompts take their time, and a fourth; each has its time, and counts until its thread ends."""
    go = threading.Event()
    body = {"prompt": "a"} if path in ("/v1/completions", "/tokenize") else BODIES[path]

    async def use(client):
        slow = lambda *_, **__: go.wait(10)  # noqa: E731
        parts = client.app.state.parts
        monkeypatch.setattr(parts.chat, "prompt", slow)
        monkeypatch.setattr(parts.tokenizer, "prompt_ids", slow)
        held = [asyncio.create_task(client.post(path, body)) for _ in range(3)]
        await asyncio.sleep(0.1)
        more = await client.post(path, body)
        late = await asyncio.gather(*held)
        still = await client.post("/v1/completions", {"prompt": [5]})
        go.set()
        for _ in range(500):
            if (reply := await client.post("/v1/completions", {"prompt": [5]})).status == 200:
                break
            await asyncio.sleep(0.01)
        return more, late, still, reply

    try:
        more, late, still, after = with_client(worded(), use, words=True, limit=3, timeout=0.5)
    finally:
        go.set()
    assert (more.status, more.json["error"]["code"], more.headers["retry-after"]) == (429, "queue_full", "1")
    assert more.error == "the queue is full: 3 requests are being prepared; expected at most 3"
    assert [(reply.status, reply.error) for reply in late] == [(504, "the request took more than 0.5 s to prepare")] * 3
    one_thread = "prompt" not in body  # whose other two have never begun
    assert (still.status, after.status) == (200 if one_thread else 429, 200)


CHAT = {**BODIES["/v1/chat/completions"], "max_tokens": 2}


def held_up(client, monkeypatch) -> threading.Event:
    """The template of this client's server takes until the event is set."""
    go, chat = threading.Event(), client.app.state.parts.chat
    prompt = chat.prompt
    monkeypatch.setattr(chat, "prompt", lambda *a, **k: go.wait(10) and prompt(*a, **k))
    return go


def test_chats_that_wait_for_the_template_keep_no_other_route_from_the_engine(monkeypatch):
    async def use(client):
        go = held_up(client, monkeypatch)
        chats = [asyncio.create_task(client.post("/v1/chat/completions", CHAT)) for _ in range(3)]
        await asyncio.sleep(0.05)
        others = await asyncio.gather(*(client.complete(prompt=[5]) for _ in range(2)))
        go.set()
        return others, await asyncio.gather(*chats)

    others, chats = with_client(worded(), use, words=True, limit=3)
    assert [reply.status for reply in (*others, *chats)] == [200] * 5


def test_a_chat_is_refused_before_its_template_is_rendered_or_not_at_all(monkeypatch):
    async def use(client):
        rendered = []
        running = asyncio.create_task(client.complete(prompt=[5], max_tokens=30))
        await asyncio.sleep(0.05)
        with monkeypatch.context() as patch:
            patch.setattr(client.app.state.parts.chat, "prompt", lambda *_, **__: rendered.append(1))
            full = await client.post("/v1/chat/completions", CHAT)
        await running
        go = held_up(client, monkeypatch)
        chat = asyncio.create_task(client.post("/v1/chat/completions", CHAT))
        await asyncio.sleep(0.05)
        late = await client.complete(prompt=[5])
        go.set()
        return full, rendered, late, await chat

    full, rendered, late, chat = with_client(worded(wait=0.01), use, words=True, limit=1)
    assert full.error == late.error == "the queue is full: 1 requests are open or prepared; expected at most 1"
    assert (full.status, rendered, late.status, chat.status) == (429, [], 429, 200)


@pytest.mark.parametrize("path", BODIES)
def test_a_shutdown_answers_those_whose_prompts_are_prepared(path, monkeypatch):
    async def use(client):
        go = held_up(client, monkeypatch)
        monkeypatch.setattr(client.app.state.parts.tokenizer, "prompt_ids", lambda *_: go.wait(10))
        body = BODIES[path] if "prompt" not in BODIES[path] else {"prompt": "a"}
        tasks = [asyncio.create_task(client.post(path, body)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await client.app.state.parts.service.drain(5)
        replies = await asyncio.wait_for(asyncio.gather(*tasks), 1)
        go.set()
        return replies

    for reply in with_client(worded(), use, words=True):
        assert (reply.status, reply.error) == (503, "the server is shutting down")
        assert reply.headers["retry-after"] == "5"


def test_a_chat_that_is_rendered_keeps_its_places_until_the_engine_has_it(monkeypatch):
    """Two choices, while their grammar takes its time; others are refused meanwhile, and served afterwards."""

    async def use(client):
        parts, begun, go = client.app.state.parts, asyncio.Event(), asyncio.Event()

        class Slow:
            async def prepare(self, grammar):
                begun.set()
                await go.wait()

        chat = {**CHAT, "n": 2, "guided_regex": "a"}
        with monkeypatch.context() as patch:
            patch.setitem(parts.__dict__, "grammars", Slow())
            held = asyncio.create_task(client.post("/v1/chat/completions", chat))
            await begun.wait()
            late = [await client.complete(prompt=[5]) for _ in range(2)]
            go.set()
            reply = await held
        return reply, late, await client.complete(prompt=[5], n=2)

    reply, late, after = with_client(worded(), use, words=True, limit=2)
    assert [reply.status, after.status] == [200, 200]
    refused = "the queue is full: 2 requests are open or prepared; expected at most 2"
    assert [(one.status, one.error) for one in late] == [(429, refused)] * 2
